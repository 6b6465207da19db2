"""`shoal bench efficiency`: what equal loss costs the baseline and the recipes."""

from .command import run_bench as run_bench
