"""`shoal eval --data`: bits per byte of text under a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config import CorpusConfig, EvalCommand, ModelConfig, UserError
from ..data import Tokenizer, open_corpus
from ..engine import Plain, load_plain
from ..train import Likelihood, likelihood
from ..train.run_folder import trained_length

DEFAULT_WINDOW = 2048


def run_eval(command: EvalCommand) -> dict[str, Any]:
    """Score the held-out part of a folder that names one, and anything else whole; prints a table, returns the JSON object."""
    command.validate()
    loaded = load_plain(command.model, command.machine)
    longest = loaded.model.config.max_position_embeddings
    window = default_window(loaded.folder, loaded.model.config) if command.window is None else command.window
    overlap = window // 2 if command.overlap is None else command.overlap
    if not 1 <= window <= longest:
        raise UserError(f"--window is {window}: this model sees 1 to {longest} tokens")
    if not 0 <= overlap < window:
        raise UserError(f"--overlap is {overlap}: it must be 0 or more and less than the window of {window}")
    corpus = open_corpus(command.data, CorpusConfig(text_column=command.text_column))
    result = score_texts(loaded, corpus.texts_to_score(), window=window, overlap=overlap, limit=command.max_tokens)
    if not result.bytes:
        raise UserError(f"{corpus.name} holds no text to score")
    details = f"{result.bytes:,} bytes ({result.tokens:,} tokens, {result.nats_per_token:.4f} nats per token)"
    print(f"{result.bits_per_byte:.4f} bits per byte over {details}")
    return {
        "bpb": result.bits_per_byte,
        "nats_per_token": result.nats_per_token,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "window": window,
        "overlap": overlap,
    }


def score_texts(
    plain: Plain, texts: Iterable[str], *, window: int | None = None, overlap: int | None = None, limit: int | None = None
) -> Likelihood:
    """How likely a model holds `texts`, or the first of them that have `limit` tokens; `window` defaults to that of `default_window`."""
    window = window or default_window(plain.folder, plain.model.config)
    with _Progress() as progress:
        documents = _tokenized(texts, plain.tokenizer, limit)
        result = likelihood(plain.model, plain.machine, documents, window=window, overlap=overlap, progress=progress.add)
    if not math.isfinite(result.nats):
        raise UserError("the model's likelihoods are not numbers: its files are damaged, or its training had diverged")
    return result


def default_window(folder: Path, config: ModelConfig) -> int:
    """Sequence length of the run that a model comes from; else the longest context up to `DEFAULT_WINDOW`."""
    return trained_length(folder, config) or min(DEFAULT_WINDOW, config.max_position_embeddings)


def _tokenized(texts: Iterable[str], tokenizer: Tokenizer, limit: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Documents as `likelihood` takes them."""
    count = 0
    for text in texts:
        tokens = tokenizer.document(text)
        yield np.asarray(tokens), len(text.encode("utf-8", "surrogatepass"))
        count += len(tokens)
        if limit is not None and count >= limit:
            return


class _Progress:
    """Tokens scored so far, on stderr; nothing where that is not a terminal."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn

        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} tokens scored"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None)
        self._bar.start()
        return self

    def add(self, tokens: int) -> None:
        self._bar.advance(self._task, tokens)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
