"""What the operator, the runner and the CRD share: models, states, reasons and names, each written once."""
