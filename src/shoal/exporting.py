"""`shoal export`: a model as files that other software opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from .config import ExportCommand
from .data import Tokenizer
from .formats.export import export_model
from .formats.fp8 import quantizer_for
from .formats.gguf import GgufType, export_gguf
from .formats.huggingface import dtype_name, load_model
from .formats.locate import locate_model
from .formats.weight_files import read_generation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run_export(command: ExportCommand) -> dict[str, Any]:
    """Write OUT; returns the JSON object."""
    command.validate()
    folder, out = locate_model(command.model), Path(command.out).expanduser()
    return _gguf(command, folder, out) if command.format == "gguf" else _hf(command, folder, out)


def _hf(command: ExportCommand, folder: Path, out: Path) -> dict[str, Any]:
    wanted = DTYPES.get(command.dtype or "")
    model, tokenizer, generation = load_model(folder, dtype=wanted), Tokenizer.load(folder), read_generation(folder)
    if command.dtype == "fp8":
        with quantizer_for(folder) as quantizer:
            export_model(model, tokenizer, out, torch.bfloat16, source=folder, fp8=quantizer, generation=generation)
        dtype = "float8_e4m3fn"
    else:
        export_model(model, tokenizer, out, wanted, source=folder, generation=generation)
        dtype = dtype_name(model)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {model.config.model_type}, {dtype}, {size / 1e6:.1f} MB; opens with transformers, vLLM and SGLang")
    return {"out": str(out), "model_type": model.config.model_type, "dtype": dtype, "bytes": size}


def _gguf(command: ExportCommand, folder: Path, out: Path) -> dict[str, Any]:
    dtype = cast(GgufType, command.dtype or "f16")
    config = export_gguf(folder, Tokenizer.load(folder), out, dtype)
    size = out.stat().st_size
    depths = config.num_nextn_predict_layers
    extra = f", {depths} MTP layer{'s' if depths > 1 else ''}" if depths else ""
    print(f"{out}: {config.model_type}, {dtype}{extra}, {size / 1e6:.1f} MB; opens with llama.cpp")
    return {"out": str(out), "model_type": config.model_type, "dtype": dtype, "bytes": size, "mtp_layers": depths}
