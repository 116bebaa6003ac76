"""Choosing under bytes: spaces, the knapsack, the study around it, baselines."""
