"""The weights of one model as the engine's runners read them."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import UserError
from ..formats.huggingface import open_model, refuse_other_copies
from ..formats.packing import pack_files
from ..formats.parts import EMBEDDING, Scheme, parts_of
from ..formats.quantized import Weights, dequantized, is_quantized, open_quantized
from ..model import Transformer
from ..runtime import require_memory


def plain_scheme(name: str) -> Scheme:
    """All weights in fp32 or bf16."""
    return Scheme(name, name, name, name)  # type: ignore[arg-type]


def quantized_scheme(bits: int, group: int = 32) -> Scheme:
    """What `--bits` means: 4 keeps the matrices of multi-token prediction in int8; embedding bf16."""
    if bits not in (4, 8):
        raise UserError(f"--bits is {bits}: it must be 4 or 8")
    if group not in (32, 64):
        raise UserError(f"--group is {group}: it must be 32 or 64")
    return Scheme("int4" if bits == 4 else "int8", "int8", "int8", "bf16", group)


def load_weights(folder: Path, bits: int | None = None, group: int = 32, *, precision: str | None = None) -> Weights:
    """The weights in `folder` (as `locate_model` finds it), quantized on the way with `bits`, else in `precision` (fp32 or bf16).

    Without either they are held in bf16 where the folder has them so, and in fp32 otherwise: bf16 would round fp16.

    A quantized folder is mapped as it is. Any other is read tensor by tensor: no more memory is needed than for the result and one tensor.

    Raises `UserError` for what `open_model` and `open_quantized` refuse, and at once where the result does not fit in memory.
    """
    if is_quantized(folder):
        if bits is not None:
            raise UserError(f"{folder} is quantized already: leave --bits away, or name the original model")
        return open_quantized(folder)
    with open_model(folder) as (empty, files):
        stored = "bf16" if files.plain_dtype(EMBEDDING) == torch.bfloat16 else "fp32"
        scheme = plain_scheme(precision or stored) if bits is None else quantized_scheme(bits, group)
        plan = parts_of(empty.config, scheme)
        largest = max(tensor.numel() * 4 for tensor in empty.state_dict().values() if tensor.ndim < 3)
        require_memory(sum(part.nbytes for part in plan.values()) + largest, f"{folder} in {scheme.matrices}")
        refuse_other_copies(empty.config, files)
        return Weights(empty.config, scheme, dict(pack_files(files, empty.config, plan)))


def to_transformer(weights: Weights, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Transformer:
    """The same function in plain torch."""
    return dequantized(weights.config, weights.parts, dtype, device)
