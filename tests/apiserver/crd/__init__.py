"""CRD, examples and the chart's RBAC on a real API server."""
