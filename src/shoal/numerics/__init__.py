"""Smaller numbers: block-scaled FP8, grouped integers."""
