"""Safetensors files of a model's folder: what they hold is checked before any of it is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import UserError
from ..numerics.fp8 import Quantized, dequantize_blocks

WEIGHTS = "model.safetensors"
SCALE = "_scale_inv"
"""What the name of an FP8 tensor's scales ends with."""
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION = "generation_config.json"

LARGEST_SHARD = 5 * 10**9
"""Bytes of a file of weights, at most."""
FORGET_AFTER = 1 << 28
"""Bytes read through a mapping before it is made anew: until then they count as this process's memory."""

_PIECE = 1 << 20
_HARMLESS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_FLOATS = ("F32", "BF16", "F16")
_FP8 = "F8_E4M3"
_WHOLE_NUMBERS = {"counted.entries": "I64", "counted.counts": "I16"}
"""Tensors that are no weights, by the end of their names (model/counted.py)."""


class WeightFiles:
    """The safetensors files of a folder, read one tensor at a time; a context manager."""

    def __init__(self, folder: Path, fp8_block: tuple[int, int] = (128, 128)) -> None:
        self.folder = folder
        self.fp8_block = fp8_block
        self.file_of: dict[str, Any] = {}
        self._stack = ExitStack()
        self._touched = 0

    def __enter__(self) -> WeightFiles:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.file_of = {}

    def _open(self) -> None:
        with ExitStack() as opened:
            found: dict[str, Any] = {}
            for path in shard_paths(self.folder):
                file = opened.enter_context(open_shard(path))
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    if name in found:
                        raise UserError(f"{self.folder} holds the tensor {name} in more than one file: copy or download it again")
                    found[name] = file
            self._stack = opened.pop_all()
        self.file_of = found
        self._touched = 0

    def has_prefix(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.file_of)

    def shape(self, name: str) -> list[int]:
        return list(self.file_of[name].get_slice(name).get_shape())

    def stored(self, name: str) -> str:
        """How a tensor's numbers are stored, in the words of safetensors; `UserError` where there is no such tensor."""
        if name not in self.file_of:
            raise UserError(f"{self.folder} lacks the tensor {name}: the files are incomplete")
        return str(self.file_of[name].get_slice(name).get_dtype())

    def is_fp8(self, name: str) -> bool:
        return self.stored(name) == _FP8

    def plain_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor that is never quantized."""
        self._require_readable(name)
        return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(self.stored(name), torch.float32)

    def check(self, shapes: Mapping[str, Sequence[int]], copies: Iterable[str] = ()) -> None:
        """Raise `UserError` unless the files hold exactly the tensors of `shapes`, in these shapes and in readable number formats.

        `copies` are names that may be there besides.
        """
        missing = [name for name in shapes if name not in self.file_of]
        if missing:
            raise UserError(f"{self.folder} lacks {some(missing)}: the files are incomplete or config.json belongs to another model")
        wanted = {*shapes, *(name for name in copies if name in self.file_of)}
        wanted |= {name + SCALE for name in wanted if name + SCALE in self.file_of and self.is_fp8(name)}
        # transformers writes parts that a model does not have, such as 0 shared experts, as tensors without elements
        others = [name for name in self.file_of if name not in wanted and 0 not in self.shape(name)]
        unexpected = [name for name in others if not _HARMLESS.search(name)]
        if unexpected:
            raise UserError(f"{self.folder} has {some(unexpected)} that config.json does not account for: is it another model's?")
        for name, shape in shapes.items():
            if self.shape(name) != list(shape):
                raise UserError(f"{self.folder}: {name} has shape {self.shape(name)}, but config.json makes it {list(shape)}")
            self._require_readable(name)

    def _require_readable(self, name: str) -> None:
        stored = self.stored(name)
        if stored == _FP8:
            if name + SCALE not in self.file_of:
                raise UserError(f"{self.folder}: {name} is FP8 but its scales {name + SCALE} are missing")
            if self.stored(name + SCALE) not in _FLOATS:
                raise UserError(f"{self.folder}: {name + SCALE} is stored as {self.stored(name + SCALE)}, but scales are numbers in fp32")
        elif stored not in _FLOATS and not any(name.endswith(end) and stored == kind for end, kind in _WHOLE_NUMBERS.items()):
            kind = stored.replace("I", "int") if stored.startswith(("I", "U")) else stored
            raise UserError(f"{self.folder}: {name} is stored as {kind}, which is not supported: use fp32, bf16 or block-scaled FP8")

    def read(self, name: str) -> Tensor:
        """One tensor, dequantized where it is FP8 with scales, all its numbers finite."""
        self._require_readable(name)
        size = math.prod(self.shape(name)) * {"F32": 4, "I64": 8, _FP8: 1}.get(self.stored(name), 2)
        if self._touched and self._touched + size > FORGET_AFTER:
            self._stack.close()
            self._open()
        tensor: Tensor = self.file_of[name].get_tensor(name)
        self._touched += size
        if self.is_fp8(name):
            tensor = dequantize_blocks(tensor, self.file_of[name + SCALE].get_tensor(name + SCALE), block=self.fp8_block)
        if not _all_finite(tensor):
            raise UserError(f"{self.folder}: {name} holds NaN or infinite numbers: the file is damaged or the run had diverged")
        return tensor

    def read_fp8(self, name: str) -> Quantized:
        """A tensor that `is_fp8`, as it is stored."""
        self._require_readable(name)
        data, scales = (self.file_of[part].get_tensor(part) for part in (name, name + SCALE))
        return Quantized(data, scales)


def open_shard(path: Path) -> Any:
    """One safetensors file, mapped; `UserError` where it is not whole."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a whole safetensors file ({reason}): copy or download it again") from None


def shard_paths(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder, all of them there."""
    index = folder / INDEX
    names: list[Any] = [WEIGHTS]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map: copy or download it again")
        names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names the file {name!r}, which does not lie beside it: copy or download it again")
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}: the weights must be complete and in safetensors format")
    return [folder / name for name in names]


def shard_names(count: int) -> list[str]:
    """What `count` files of weights are called."""
    return [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut so that a shard has at most `limit` bytes (or one tensor)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def some(names: Iterable[str]) -> str:
    """`5 tensors (a, b, c and 2 more)`, for messages."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{more})"


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; `UserError` where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} cannot be read: name a folder with a model in Hugging Face format") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON: copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object: copy or download it again")
    return content


def read_generation(folder: Path) -> dict[str, Any]:
    """`generation_config.json` of a folder: how whoever made the model would have it sampled; nothing where there is none."""
    path = folder / GENERATION
    return read_json(path) if path.is_file() else {}


def write_generation(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> None:
    """Write `generation_config.json` beside `config.json`, whose content `config` is: `generation` and the tokens that texts begin and end
    with, of which it may know more."""
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / GENERATION, ends | {key: value for key, value in (generation or {}).items() if key != "transformers_version"})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _all_finite(tensor: Tensor) -> bool:
    return all(bool(piece.isfinite().all()) for piece in tensor.flatten().split(_PIECE))
