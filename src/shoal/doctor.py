"""`shoal doctor`: what this machine can do, and which parts of Shoal work here."""

from __future__ import annotations

import importlib.util
import platform
from typing import Any

import torch

from . import __version__
from .kernels.selection import BACKEND, multiplies_fp8
from .runtime import start

OPTIONAL = {
    "matplotlib": ("the report of a run", "report"),
    "tensorboard": ("shoal train --tensorboard", "report"),
    "pyarrow": ("Parquet files", "data"),
    "zstandard": (".zst files", "data"),
    "datasets": ("Hugging Face datasets by name", "data"),
    "fastapi": ("shoal serve", "serve"),
    "uvicorn": ("shoal serve", "serve"),
    "llguidance": ("answers of a given form", "serve"),
    "prometheus_client": ("figures of shoal serve", "serve"),
    "gguf": ("shoal export --format gguf", "export"),
    "transformers": ("shoal bench train --vs transformers", "peers"),
    "llama_cpp": ("shoal bench engine --vs llama.cpp", "peers"),
    "triton": ("FP8 on GPUs", "gpu"),
}
"""Package -> (what needs it, extra that installs it)."""


def run_doctor() -> dict[str, Any]:
    """Print one line a subject; returns the JSON object."""
    machine = start()
    packages = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}
    lines = {
        "shoal": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": machine.describe(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernels": BACKEND.reason,
        "fp8": "Triton kernels" if multiplies_fp8(machine.device) else "simulated in training, which is exact and slower",
    }
    for name, value in lines.items():
        print(f"{name:<9}{value}")
    for name, here in packages.items():
        use, extra = OPTIONAL[name]
        print(f"{'':<9}{name}: {'here' if here else f'missing; pip install shoal[{extra}]'} ({use})")
    return lines | {
        "device": str(machine.device),
        "precision": machine.precision,
        "threads": machine.threads,
        "matmul_flops": machine.peak_flops,
        "packages": packages,
    }
