"""Runs models: cache, sampling, generation."""

from .command import complete as complete
from .generate import TextStream as TextStream
from .generate import generate as generate
from .load import Loaded as Loaded
from .load import load as load
