"""Smaller numbers: block-scaled FP8."""

from .fp8 import dequantize_blocks as dequantize_blocks
