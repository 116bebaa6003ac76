"""Texts to documents, splits and packed rows of tokens."""
