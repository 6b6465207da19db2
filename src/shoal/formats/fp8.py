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

SETTINGS: dict[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "ue8m0",
}  # fmt: skip
"""`quantization_config` of a folder that Shoal writes."""
_MATRIX = re.compile(r"\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj)\.weight")


class Quantizer(Protocol):
    """Says which tensors are held in FP8, by their names in the files, and gives that form of them."""

    settings: dict[str, Any]

    def takes(self, name: str) -> bool: ...

    def __call__(self, name: str, weight: Tensor) -> Quantized: ...


class Fresh:
    """Rounds to FP8 what the official files hold so."""

    settings = SETTINGS

    def takes(self, name: str) -> bool:
        return _MATRIX.search(name) is not None

    def __call__(self, name: str, weight: Tensor) -> Quantized:
        once = quantize_blocks(weight, power_of_two=True)
        # The largest number of a block may have been rounded down to half of the range, which half the scale holds.
        return quantize_blocks(dequantize_blocks(once.data, once.scales), power_of_two=True)


class AsStored:
    """Takes what a folder holds in FP8, bit by bit; its `settings` may name matrices that it holds otherwise."""

    def __init__(self, files: WeightFiles, settings: dict[str, Any]) -> None:
        self.files, self.settings = files, settings

    def takes(self, name: str) -> bool:
        return name in self.files.file_of and self.files.is_fp8(name)

    def __call__(self, name: str, weight: Tensor) -> Quantized:
        return self.files.read_fp8(name)


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
