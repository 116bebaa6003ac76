"""Distance to the teacher: losses, measured KL, evaluation, tasks."""
