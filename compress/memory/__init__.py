"""What fits: exact bytes of a deployment, devices, budgets; and what the work takes."""
