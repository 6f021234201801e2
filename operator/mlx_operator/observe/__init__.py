"""Observation: watches, report streams, sweeps and the store that they feed."""
