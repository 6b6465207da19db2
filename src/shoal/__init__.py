"""Shoal trains, shrinks and serves DeepSeek-style language models on the hardware people have."""

__version__ = "0.1.0"
