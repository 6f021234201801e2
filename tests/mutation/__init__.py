"""Every field of the CRD, mutated by itself, on a real API server."""
