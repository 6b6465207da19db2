"""The official FP8 layout: a matrix `X.weight` as float8_e4m3fn beside `X.weight_scale_inv`, fp32 `[ceil(O / 128), ceil(I / 128)]`.

Embedding, output head, norms, routers and the projection of prediction modules stay in BF16. Scales are powers of two, as in DeepSeek-V3.1
(`scale_fmt` ue8m0), so that BF16 holds every dequantized number exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..config import UserError
from ..numerics.fp8 import Quantized, dequantize_blocks, quantize_blocks
from .weight_files import CONFIG, WeightFiles, read_json

SCALE = "_scale_inv"
SETTINGS: dict[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "ue8m0",
}  # fmt: skip
"""`quantization_config` of a folder that Shoal writes."""
_MATRIX = re.compile(r"\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj)\.weight")


class Quantizer(Protocol):
    """Gives the FP8 form of a matrix by its name in the files."""

    settings: dict[str, Any]

    def __call__(self, name: str, weight: Tensor) -> Quantized: ...


class Fresh:
    """Rounds weights to FP8."""

    settings = SETTINGS

    def __call__(self, name: str, weight: Tensor) -> Quantized:
        once = quantize_blocks(weight, power_of_two=True)
        # The largest number of a block may have been rounded down to half of the range, which half the scale holds.
        return quantize_blocks(dequantize_blocks(once.data, once.scales), power_of_two=True)


class AsStored:
    """Takes what a folder in FP8 holds, bit by bit."""

    def __init__(self, files: WeightFiles, settings: dict[str, Any]) -> None:
        self.files, self.settings = files, settings
        self.fresh = Fresh()

    def __call__(self, name: str, weight: Tensor) -> Quantized:
        found = self.files.read_fp8(name)
        return found if found is not None else self.fresh(name, weight)


@contextmanager
def quantizer_for(folder: Path) -> Iterator[Quantizer]:
    """For a model that was loaded from `folder`: what it holds where that is FP8 already, otherwise its weights rounded."""
    settings = read_json(folder / CONFIG).get("quantization_config")
    if not settings:
        yield Fresh()
        return
    if settings.get("weight_block_size") != [128, 128]:
        raise UserError(f"{folder} has FP8 blocks of {settings.get('weight_block_size')}: export it as bf16 first, and that as fp8")
    with WeightFiles(folder) as files:
        yield AsStored(files, settings)


def is_fp8_matrix(name: str) -> bool:
    """Whether the official files hold the tensor `name` in FP8."""
    return _MATRIX.search(name) is not None
