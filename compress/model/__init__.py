"""What a model is, on disk, quantized there too, and in memory."""
