"""`shoal bench quantization`: bits per byte of the same windows of text under Shoal and llama.cpp, in 16, 8 and 4 bits."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import BenchQuantizationCommand, CorpusConfig, EngineOptions, MachineOptions, UserError
from ..data import Tokenizer, open_corpus
from ..engine import Engine
from ..engine.load import load
from ..formats.gguf import export_gguf
from ..formats.huggingface import read_config
from ..formats.locate import locate_model
from ..formats.quantized import is_quantized
from ..runtime import available_cores
from .sides import Side

LLAMA_Q4_0 = 2
"""llama.cpp's number of the file type q4_0."""
AT_ONCE = 16
"""Windows that Shoal scores in one go."""


@dataclass(frozen=True)
class Sample:
    """Text cut into windows: every token but the first of a window is scored, given those before it in the window."""

    windows: list[list[int]]
    bytes: int
    tokens: int


@dataclass(frozen=True)
class Score:
    """What one form of the weights makes of the sample."""

    name: str
    file_bytes: int
    bpb: float


def cut(documents: list[tuple[list[int], int]], window: int) -> Sample:
    """Windows of at most `window` tokens from documents (ids, bytes of text); neighbours share a token: all but the first are scored."""
    windows = [ids[start : start + window] for ids, _ in documents for start in range(0, len(ids) - 1, window - 1)]
    return Sample(windows, sum(size for _, size in documents), sum(len(ids) - 1 for ids, _ in documents))


def run_bench(command: BenchQuantizationCommand) -> dict[str, Any]:
    """Score all forms of the weights, print the table, return the JSON object."""
    command.validate()
    folder = locate_model(command.model)
    if is_quantized(folder):
        raise UserError(f"{folder} is quantized already: name the original model, and this one with --quantized")
    quantized = [(Path(path).name, locate_model(path)) for path in command.quantized]
    tokenizer = Tokenizer.load(folder)
    window = min(command.window, read_config(folder).max_position_embeddings)
    sample = cut(_documents(command, tokenizer), window)
    threads = command.threads or available_cores()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as place:  # first, as most can be missing here
        theirs = _llama(folder, tokenizer, sample, threads, Path(place), command.llama_python)
    ours = [_shoal("shoal", folder, None, sample, threads)]
    ours += [_shoal(f"shoal, {bits} bits", folder, bits, sample, threads) for bits in (8, 4)]
    ours += [_shoal(f"shoal, {name}", path, None, sample, threads) for name, path in quantized]
    scores = ours + theirs
    result = summarize(scores, sample)
    _print(scores, sample, result)
    return result


def _documents(command: BenchQuantizationCommand, tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    found: list[tuple[list[int], int]] = []
    count = 0
    for text in open_corpus(command.data, CorpusConfig()).texts_to_score():
        ids = tokenizer.document(text)
        found.append((ids, len(text.encode("utf-8", "surrogatepass"))))
        count += len(ids)
        if count >= command.max_tokens:
            break
    if not found:
        raise UserError("--data holds no text to score")
    return found


def _shoal(name: str, folder: Path, bits: int | None, sample: Sample, threads: int) -> Score:
    """The engine itself, with its kernels' arithmetic."""
    loaded = load(str(folder), MachineOptions("cpu", "auto", threads), bits)
    room = AT_ONCE * (max(map(len, sample.windows)) + 64)
    engine = Engine(loaded.runner, None, EngineOptions(cache_tokens=room, prefix_cache=False, speculate="off", cache="fp32"))
    nats = 0.0
    for start in range(0, len(sample.windows), AT_ONCE):
        nats -= sum(map(sum, engine.score(sample.windows[start : start + AT_ONCE])))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if bits is None else 0
    return Score(name, size, nats / math.log(2) / sample.bytes)


def _llama(folder: Path, tokenizer: Tokenizer, sample: Sample, threads: int, place: Path, python: str | None) -> list[Score]:
    """llama.cpp on the exported files, and on what its own quantizer makes of the fp32 file (it keeps the output head in more bits)."""
    scores = []
    for name in ("f32", "f16", "q8_0", "q4_0", "own q4_0"):
        out = place / f"{name}.gguf"
        side = Side("llama.cpp", "llama_worker", python)
        try:
            if name == "own q4_0":
                side.ask("quantize", source=str(place / "f32.gguf"), out=str(out), kind=LLAMA_Q4_0)
            else:
                export_gguf(folder, tokenizer, out, name)  # type: ignore[arg-type]
            side.ask("load", model=str(out), threads=threads, flash=0)
            nats = side.ask("nats", windows=sample.windows)["nats"]
        finally:
            side.close()
        scores.append(Score(f"llama.cpp, {name}", out.stat().st_size, nats / math.log(2) / sample.bytes))
    return scores


def summarize(scores: list[Score], sample: Sample) -> dict[str, Any]:
    """The JSON object: bits per byte of every form, and what each adds to those of the original weights on the same side."""
    by_name = {score.name: score.bpb for score in scores}
    ours, theirs = by_name["shoal"], by_name["llama.cpp, f32"]
    increases = {name: bpb - (ours if name.startswith("shoal") else theirs) for name, bpb in by_name.items()}
    peer = min(increases["llama.cpp, q4_0"], increases["llama.cpp, own q4_0"])
    ratios = {name: increases[name] / peer for name in increases if name.startswith("shoal") and name != "shoal" and peer > 0}
    return {
        "tokens": sample.tokens,
        "bytes": sample.bytes,
        "bpb": by_name,
        "increase": increases,
        "q4_increase": increases["shoal, 4 bits"],
        "llama_q4_increase": peer,
        "q4_increase_ratio": ratios.get("shoal, 4 bits"),
        "increase_ratios": ratios,
    }


def _print(scores: list[Score], sample: Sample, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"bits per byte of {sample.bytes:,} bytes ({sample.tokens:,} tokens)")
    table.add_column("", no_wrap=True)
    for column in ("bits per byte", "increase", "file, MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in scores:
        size = f"{score.file_bytes / 1e6:,.1f}" if score.file_bytes else ""
        table.add_row(score.name, f"{score.bpb:.5f}", f"{result['increase'][score.name]:+.5f}", size)
    Console(highlight=False).print(table)
