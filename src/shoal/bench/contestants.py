"""The models of `shoal bench engine`: the same weights in the form that each side reads, kept for the next call."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from ..atomic import new_folder
from ..config import BenchEngineCommand, ModelConfig, UserError
from ..config.recipes import load_recipe
from ..data import Tokenizer
from ..engine.weights import quantized_scheme
from ..formats.gguf import GgufType, export_gguf
from ..formats.huggingface import read_config, save_model
from ..formats.locate import locate_model
from ..formats.parts import parts_of
from ..formats.quantized import is_quantized
from ..model import Transformer, init_weights
from ..plan.models import BUILT_IN
from ..runtime import available_cores
from .random_model import write_random_folder, write_random_gguf
from .sides import Side, require_peer
from .train import SHAPE

GGUF_OF_BITS: dict[int, GgufType] = {8: "q8_0", 4: "q4_0"}
GGUF_OF_PRECISION: dict[str, GgufType] = {"fp32": "f32", "bf16": "f16"}
ROOM = 1 << 30
"""Disk that stays free."""


@dataclass(frozen=True)
class Contest:
    """What is compared."""

    name: str
    config: ModelConfig
    model: Path
    """What Shoal opens."""
    bits: int | None
    """What Shoal quantizes to when it loads; None where the folder is as it should be."""
    gguf: Path | None
    plain: Path | None
    """What transformers opens."""
    tokenizer: Tokenizer | None

    def sides(self, command: BenchEngineCommand) -> list[Side]:
        """Shoal, then its peers, loaded one after the other."""
        threads = command.threads or available_cores()
        opened: list[Side] = []
        try:
            opened.append(Side("shoal", "shoal_worker"))
            self._load(
                opened[-1], model=str(self.model), threads=threads, bits=self.bits, group=command.group, precision=command.precision,
                cache=command.cache,
            )  # fmt: skip
            if self.gguf is not None:
                opened.append(Side("llama.cpp", "llama_worker", command.llama_python))
                self._load(opened[-1], model=str(self.gguf), threads=threads, flash=1)
            if self.plain is not None and "transformers" in command.vs:
                opened.append(Side("transformers", "transformers_worker"))
                self._load(opened[-1], model=str(self.plain), threads=threads)
        except BaseException:
            for side in opened:
                side.close()
            raise
        return opened

    @staticmethod
    def _load(side: Side, **options: object) -> None:
        side.loaded = side.ask("load", **options)
        side.settings = side.loaded["settings"]


def prepare(command: BenchEngineCommand, say: Callable[[str], None]) -> Contest:
    """Make what is not there yet. Raises `UserError` where the disk is too full or a model cannot be compared."""
    if "llama.cpp" in command.vs:
        require_peer("llama_cpp", "shoal[peers]", command.llama_python)
    if "transformers" in command.vs:
        require_peer("transformers", "shoal[peers]")
    cache = Path(command.cache_dir).expanduser() if command.cache_dir else Path(tempfile.gettempdir()) / "shoal-bench"
    cache.mkdir(parents=True, exist_ok=True)
    if command.model is not None:
        return _trained(command, cache)
    if command.uses_large_shape:
        return _large("v2-lite", BUILT_IN["deepseek-v2-lite"], command, cache, say)
    config = SHAPE if command.shape == "train" else load_recipe("demo").model
    return _small(command.shape, config, command, cache)


def _trained(command: BenchEngineCommand, cache: Path) -> Contest:
    folder = locate_model(cast(str, command.model))
    if is_quantized(folder) and command.vs:
        raise UserError(f"{folder} is quantized: peers cannot open it; name the original model, with --bits")
    tokenizer, config = Tokenizer.load(folder), read_config(folder)
    gguf = _exported(folder, tokenizer, command, cache / "model.gguf")
    return Contest(str(command.model), config, folder, command.bits, gguf, folder, tokenizer)


def _exported(folder: Path, tokenizer: Tokenizer | None, command: BenchEngineCommand, out: Path) -> Path | None:
    """The GGUF file of a model, written anew: its weights may have changed."""
    if "llama.cpp" not in command.vs:
        return None
    export_gguf(folder, tokenizer, out, GGUF_OF_BITS[command.bits] if command.bits else GGUF_OF_PRECISION[command.precision])
    return out


def _small(name: str, config: ModelConfig, command: BenchEngineCommand, cache: Path) -> Contest:
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / f"{name}-{digest}"  # shapes change between versions
    if not folder.is_dir():
        model = Transformer(config)
        init_weights(model, 0)
        with new_folder(folder) as temporary:
            save_model(model, temporary)
    gguf = _exported(folder, None, command, cache / f"{name}.gguf")
    return Contest(name, config, folder, command.bits, gguf, folder, None)


def _large(name: str, config: ModelConfig, command: BenchEngineCommand, cache: Path, say: Callable[[str], None]) -> Contest:
    """Random 4-bit weights, made directly in both forms."""
    # The output head in 4 bits too, as the peer's file has it: both sides then hold the very same numbers.
    scheme = replace(quantized_scheme(4, command.group), head="int4")
    size = sum(part.nbytes for part in parts_of(config, scheme).values())
    folder, gguf = cache / f"{name}.int4-{command.group}", cache / f"{name}.q4_0-{command.group}.gguf"
    wanted: list[tuple[Path, Callable[[], None]]] = [(folder, lambda: write_random_folder(config, scheme, folder))]
    if "llama.cpp" in command.vs:
        wanted.append((gguf, lambda: write_random_gguf(config, gguf, scheme.group)))
    missing = [(path, make) for path, make in wanted if not path.exists()]
    free = shutil.disk_usage(cache).free
    if free < len(missing) * size + ROOM:
        raise UserError(
            f"{cache} needs {len(missing) * size / 1e9:.0f} GB for the models, but {free / 1e9:.0f} GB are free: use --cache-dir"
        )
    for path, make in missing:
        say(f"making {path} ({size / 1e9:.1f} GB), once")
        make()
    return Contest(name, config, folder, None, gguf if "llama.cpp" in command.vs else None, None, None)
