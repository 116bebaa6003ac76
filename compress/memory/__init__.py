"""What fits: exact bytes of a deployment, devices, budgets."""
