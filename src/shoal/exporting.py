"""`shoal export`: a model as files that other software opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .config import ExportCommand
from .data import Tokenizer
from .formats.export import export_model
from .formats.huggingface import load_model
from .formats.locate import locate_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run_export(command: ExportCommand) -> dict[str, Any]:
    """Write OUT; returns the JSON object."""
    folder, out = locate_model(command.model), Path(command.out)
    model = load_model(folder)
    dtype = DTYPES[command.dtype] if command.dtype else model.lm_head.weight.dtype
    export_model(model, Tokenizer.load(folder), out, dtype)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {model.config.model_type}, {dtype}, {size / 1e6:.1f} MB; opens with transformers, vLLM and SGLang")
    return {"out": str(out), "model_type": model.config.model_type, "dtype": str(dtype).removeprefix("torch."), "bytes": size}
