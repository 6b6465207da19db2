"""Judges models on text and tasks."""

from .bits_per_byte import default_window as default_window
from .bits_per_byte import run_eval as run_eval
from .bits_per_byte import score_texts as score_texts
