"""What a model is, on disk and in memory."""
