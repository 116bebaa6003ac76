"""Side by side with other methods and tools: same model, same text, same bytes."""
