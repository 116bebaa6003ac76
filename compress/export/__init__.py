"""Directories that stock servers load, verified."""
