"""`shoal bench ablation`: what one ingredient is worth, everything else being equal."""

from .command import run_bench as run_bench
