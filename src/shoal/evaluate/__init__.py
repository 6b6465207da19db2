"""Judges models on text and tasks."""

from .bits_per_byte import run_eval as run_eval
