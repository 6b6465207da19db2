"""`shoal quantize`: a model in 4 or 8 bits per weight."""

from .command import run_quantize as run_quantize
