"""What evaluation reads: lm-eval tasks of our own, in ``tasks/``."""
