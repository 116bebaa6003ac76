"""What plans and runs say: reads a run's files, computes nothing."""
