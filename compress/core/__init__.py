"""Failures, quantities, files, settings, the terminal: what everything else stands on; no torch."""
