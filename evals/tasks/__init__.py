"""lm-eval task files; the run that they judge writes the JSONL rows that they read."""
