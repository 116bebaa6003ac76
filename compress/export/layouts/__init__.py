"""Layouts: how a student is written so that a reader finds it, one file each.

A layout of a Hugging Face directory is a *structure* (which blocks there are) with a *quantization*
(how weights are stored); both are functions from values to values. ``table.py`` says who gets what.
"""
