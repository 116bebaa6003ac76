"""Failures, quantities, files and the terminal: what everything else stands on; no torch."""
