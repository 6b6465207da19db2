"""A model as the engine holds it: matrices in a packed number format, and small tensors, under the names of the modules they belong to.

Differences from the official tensors: routed experts are one stack `[E, O, I]` per projection; `kv_b_proj`, which MLA's absorbed form
applies head by head, is two stacks, `k_up [H, R, N]` (non-rotary query -> latent) and `v_up [H, V, R]` (latent -> value); `lm_head` is
always a matrix of its own, also where the embedding's weights are tied to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..config import ModelConfig, UserError
from ..kernels.packed import FORMATS, TILE, Format, PackedMatrix
from ..model import MLA, Router, Transformer
from ..model.counted import CountedNgrams
from ..model.layers import RMSNorm, TokenTable
from ..model.moe import Experts
from ..model.repeats import Repeats
from ..runtime import DTYPES

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head"
HEAD_WEIGHT = f"{HEAD}.weight"
EXPERTS = re.compile(r"(.+\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")
"""The matrices of all experts of a layer, stacked."""
Small = Literal["fp32", "bf16", "int64", "int16"]
"""Number formats of small tensors; integers are looked up."""
SMALL: dict[str, torch.dtype] = {**DTYPES, "int64": torch.int64, "int16": torch.int16}
_SMALL_OF: dict[torch.dtype, Small] = {dtype: cast(Small, name) for name, dtype in SMALL.items()}
GROUPS = (32, 64)


@dataclass(frozen=True)
class Scheme:
    """In which number format a model's weights are held. Norms, biases and routers are always fp32."""

    matrices: Format
    head: Format
    """Of `lm_head`."""
    mtp: Format
    """Of the matrices of multi-token prediction layers."""
    embedding: Literal["fp32", "bf16"] = "bf16"
    group: int = 32

    def __post_init__(self) -> None:
        for name in ("matrices", "head", "mtp"):
            if getattr(self, name) not in FORMATS:
                raise UserError(f"{name} in the number format {getattr(self, name)!r}: use one of {', '.join(FORMATS)}")
        if self.embedding not in tuple(DTYPES):  # a file may hold what cannot be hashed
            raise UserError(f"an embedding in the number format {self.embedding!r}: use one of {', '.join(DTYPES)}")
        if type(self.group) is not int or self.group not in GROUPS:
            raise UserError(f"groups of {self.group!r} weights: use 32 or 64")


@dataclass(frozen=True)
class Part:
    """One entry of a model: a matrix `[..., O, I]` to be packed, or a small tensor."""

    shape: tuple[int, ...]
    format: Format | Small
    is_matrix: bool
    group: int = 0

    def arrays(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of what is stored, by the field of `PackedMatrix`; `""` for a small tensor."""
        if not self.is_matrix:
            return {"": (SMALL[self.format], self.shape)}
        *leading, rows, columns = self.shape
        tiles = (*leading, -(-rows // TILE))
        if self.format in DTYPES:
            return {"data": (DTYPES[self.format], (*tiles, columns, TILE))}
        groups = -(-columns // self.group)
        lines = groups * self.group // (4 if self.format == "int8" else 8)
        return {"data": (torch.uint8, (*tiles, lines, 4 * TILE)), "scales": (torch.float16, (*tiles, groups, TILE))}

    @property
    def nbytes(self) -> int:
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.arrays().values())

    def assemble(self, arrays: dict[str, Tensor]) -> PackedMatrix | Tensor:
        """The part itself from `arrays` of the names, types and shapes of `arrays()`."""
        if not self.is_matrix:
            return arrays[""]
        rows, columns = self.shape[-2:]
        group = self.group if self.format in ("int4", "int8") else 0
        return PackedMatrix(cast(Format, self.format), rows, columns, arrays["data"], arrays.get("scales"), group)

    def empty(self) -> dict[str, Tensor]:
        return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in self.arrays().items()}


def arrays_of(part: PackedMatrix | Tensor) -> dict[str, Tensor]:
    """What is stored of a part, by field; inverse of `Part.assemble`."""
    if isinstance(part, Tensor):
        return {"": part}
    return {name: array for name in ("data", "scales") if (array := getattr(part, name)) is not None}


def parts_of(config: ModelConfig, scheme: Scheme) -> dict[str, Part]:
    """Every part of a model by name, in the order of its layers; embedding first, head last.

    Raises `UserError` for models with parts that neither the kernels nor quantized folders know.
    """
    if config.in_torch_only:
        raise UserError(f"{' and '.join(config.in_torch_only)}: such a model runs in plain torch only, neither packed nor quantized")
    with torch.device("meta"):
        model = Transformer(config)
    found: dict[str, Part] = {}
    for name, module in model.named_modules():
        mtp = name.startswith(tuple(f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers)))
        format = scheme.head if name == HEAD else scheme.mtp if mtp else scheme.matrices
        for part, shape, small in _shapes(name, module, config):
            if small is None:
                found[part] = Part(shape, format, True, scheme.group)
            else:
                found[part] = Part(shape, scheme.embedding if part == EMBEDDING else small, False)
    return found


def _shapes(name: str, module: nn.Module, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], Small | None]]:
    """Name, shape, and number format (None for a matrix) of what a module itself (not its children) holds."""
    found: dict[str, Any] = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    tensors = {key: tensor for key, tensor in found.items() if tensor is not None}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if isinstance(module, Experts):
        yield from ((f"{name}.{key}", shape, None) for key, shape in shapes.items())
    elif isinstance(module, nn.Embedding | RMSNorm | Router | TokenTable | CountedNgrams | Repeats):
        yield from ((f"{name}.{key}", shape, _SMALL_OF[tensors[key].dtype]) for key, shape in shapes.items())
    elif name.endswith(".kv_b_proj"):
        heads, nope, value, latent = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
        attention = name.removesuffix(".kv_b_proj")
        yield f"{attention}.k_up", (heads, latent, nope), None
        yield f"{attention}.v_up", (heads, value, latent), None
    elif "weight" in shapes:
        yield name, shapes["weight"], None
        if "bias" in shapes:
            yield f"{name}.bias", shapes["bias"], "fp32"
    else:
        assert isinstance(module, MLA) or not shapes, f"{name} holds {', '.join(shapes)}"


def split_kv_up(weight: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """`kv_b_proj.weight [H * (N + V), R]` -> `k_up [H, R, N]`, `v_up [H, V, R]`."""
    heads = weight.unflatten(0, (config.num_attention_heads, -1))
    key, value = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    return key.transpose(1, 2), value


def join_kv_up(key: Tensor, value: Tensor) -> Tensor:
    """Inverse of `split_kv_up`."""
    return torch.cat([key.transpose(1, 2), value], dim=1).flatten(0, 1)
