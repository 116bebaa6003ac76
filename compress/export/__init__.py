"""Hugging Face directories, read back before they count."""
