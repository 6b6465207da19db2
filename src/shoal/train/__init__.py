"""Pretraining: loss, optimizers, schedule, trainer, report."""

from .likelihood import Likelihood as Likelihood
from .likelihood import likelihood as likelihood
from .run_folder import find_run as find_run
from .trainer import Trained as Trained
from .trainer import train as train
