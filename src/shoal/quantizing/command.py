"""`shoal quantize`."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CorpusConfig, QuantizeCommand, UserError
from ..data import Corpus, Tokenizer, open_corpus
from ..engine.load import Plain, load_transformer
from ..engine.weights import quantized_scheme
from ..evaluate import default_window, score_texts
from ..formats.huggingface import open_model, refuse_other_copies
from ..formats.locate import locate_model
from ..formats.packing import BITS, RoundingCost, pack_files
from ..formats.parts import Part, Scheme, parts_of
from ..formats.quantized import is_quantized, refuse_other, write_quantized
from ..formats.weight_files import WeightFiles, read_generation
from ..kernels.packed import PackedMatrix
from ..model import Transformer
from ..runtime import Machine, peak_memory, require_memory, start
from ..train.run_folder import TRAINED_LENGTH
from .calibrate import Calibration
from .calibration_text import calibration_ids
from .report import Settled, figures, print_table

SCORED_TOKENS = 65536
"""Held-out tokens that bits per byte before and after are measured on, where the text comes from `--calibrate`."""

Packed = tuple[str, PackedMatrix | Tensor]


def run_quantize(command: QuantizeCommand) -> dict[str, Any]:
    """Write OUT; prints a table and returns the JSON object."""
    command.validate()
    folder, out = locate_model(command.model), Path(command.out).expanduser()
    if is_quantized(folder):
        raise UserError(f"{folder} is quantized already: name the original model")
    _require_place(out)
    tokenizer = Tokenizer.load(folder)
    corpora = [
        open_corpus(data, CorpusConfig(text_column=command.text_column)) if data else None for data in (command.calibrate, command.data)
    ]
    machine = start("cpu", "fp32", command.threads)
    began = time.perf_counter()
    scheme = quantized_scheme(command.bits, command.group)
    with open_model(folder) as (empty, files), torch.inference_mode():
        plan = parts_of(empty.config, scheme)
        _require_room(out, plan)
        window = default_window(folder, empty.config)
        if window != default_window(out, empty.config):
            empty.config.extra[TRAINED_LENGTH] = window
        ids = None
        if corpora[0] is not None:
            ids = calibration_ids(corpora[0], tokenizer, command.calibrate_tokens, window)
        _require_memory(empty, plan, ids)
        refuse_other_copies(empty.config, files)
        matrices: list[Settled] = []
        with _Progress(plan) as progress:
            parts = _parts(empty, files, plan, ids, matrices)
            write_quantized(out, empty.config, scheme, progress.watch(parts), tokenizer, generation=read_generation(folder))
    seconds = time.perf_counter() - began
    weights = sum(matrix.weights for matrix in matrices)
    result = {
        "out": str(out),
        "bits": command.bits,
        "group": command.group,
        "calibration_tokens": 0 if ids is None else ids.numel(),
        "bytes": sum(file.stat().st_size for file in out.iterdir()),
        "bytes_before": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "bits_per_weight": 8 * sum(matrix.nbytes for matrix in matrices) / weights,
        "seconds": seconds,
        "peak_memory": peak_memory(torch.device("cpu")),
        **_bits_per_byte(folder, out, tokenizer, machine, corpora),
        **figures(matrices),
    }
    print_table(matrices)
    print(_summary(result, scheme))
    return result


def _parts(empty: Transformer, files: WeightFiles, plan: dict[str, Part], ids: Tensor | None, matrices: list[Settled]) -> Iterator[Packed]:
    """The model's parts, quantized; what became of each matrix is added to `matrices`."""
    if ids is not None:
        return Calibration(files, empty.config, plan, ids, matrices.append).parts()

    def packed(name: str, cost: RoundingCost) -> None:
        part = plan[name]
        if part.format in BITS:
            matrices.append(Settled(name, part.format, math.prod(part.shape), part.nbytes, cost.share))

    return pack_files(files, empty.config, plan, packed)


def _bits_per_byte(folder: Path, out: Path, tokenizer: Tokenizer, machine: Machine, corpora: list[Corpus | None]) -> dict[str, Any]:
    """Before and after, on `--data` or on what `--calibrate` holds out; None each without text, or where the model in fp32 has no room."""
    calibrate, data = corpora
    found: dict[str, Any] = {"bpb_before": None, "bpb_after": None, "bpb_increase": None}
    if calibrate is None and data is None:
        return found
    for key, path in (("bpb_before", folder), ("bpb_after", out)):
        texts = data.texts_to_score() if data is not None else calibrate.val_documents() if calibrate is not None else ()
        try:
            plain = Plain(load_transformer(path), tokenizer, machine, folder)
        except UserError as error:
            print(f"bits per byte are not measured: {error}", file=sys.stderr)
            return found
        found[key] = score_texts(plain, texts, limit=None if data is not None else SCORED_TOKENS).bits_per_byte
    found["bpb_increase"] = found["bpb_after"] - found["bpb_before"]
    return found


def _summary(result: dict[str, Any], scheme: Scheme) -> str:
    how = f"calibrated with {result['calibration_tokens']:,} tokens" if result["calibration_tokens"] else "rounded to nearest"
    size = f"{result['bytes_before'] / 1e6:,.1f} -> {result['bytes'] / 1e6:,.1f} MB, {result['bits_per_weight']:.2f} bits per weight"
    text = f"{result['out']}: {scheme.matrices} in groups of {scheme.group}, {how}; {size}, in {result['seconds']:.1f} s"
    if result["bpb_increase"] is not None:
        text += f"\n{result['bpb_before']:.4f} -> {result['bpb_after']:.4f} bits per byte ({result['bpb_increase']:+.4f})"
    return text


def _require_place(out: Path) -> None:
    refuse_other(out)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{out} cannot be made: {parent} is no folder to write in")


def _require_room(out: Path, plan: dict[str, Part]) -> None:
    needed = sum(part.nbytes for part in plan.values())
    free = shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.exists())).free
    if needed > free:
        raise UserError(f"{out} needs {needed / 1e9:.1f} GB of disk, but only {free / 1e9:.1f} are free: make room or choose another OUT")


def _require_memory(empty: Transformer, plan: dict[str, Part], ids: Tensor | None) -> None:
    largest = max(part.nbytes for part in plan.values()) + max(4 * p.numel() for p in empty.parameters() if p.ndim < 3)
    if ids is None:
        require_memory(largest, "packing the largest matrix")
        return
    layers = [4 * sum(p.numel() for p in layer.parameters()) for layer in empty.model.layers]
    states = 4 * ids.numel() * empty.config.hidden_size
    needed = max(largest, 2 * max(layers)) + 2 * states
    require_memory(needed, f"calibrating (a layer and {ids.numel():,} tokens; --calibrate-tokens says how many)")


class _Progress:
    """How much of the model is done, on stderr; nothing where that is not a terminal."""

    def __init__(self, plan: dict[str, Part]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._plan = plan
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("quantizing", total=sum(part.nbytes for part in plan.values()))

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def watch(self, parts: Iterator[Packed]) -> Iterator[Packed]:
        for name, part in parts:
            yield name, part
            self._bar.update(self._task, description=name, advance=self._plan[name].nbytes)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
