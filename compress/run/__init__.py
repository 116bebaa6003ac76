"""What is done, in what order, resumable: recipe, run directory, stages."""
