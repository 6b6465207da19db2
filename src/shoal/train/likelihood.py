"""Bits per byte of text under a model: the figure all comparisons use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..data import PreparedData, Tokenizer
from ..kernels.reference import IGNORED
from ..model import Output, Transformer
from ..parallel import Team
from ..runtime import Machine, divided_inference, inference

Document = tuple[np.ndarray, int]
"""Token ids from begin-of-text to end-of-text, and the length of the text in UTF-8 bytes."""


BATCH_TOKENS = 8192
"""Scored at a time, unless less memory is to be used."""


@dataclass
class Likelihood:
    """Total over scored documents; a document is its tokens and the end-of-text token, given the begin-of-text token."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens


def held_out(data: PreparedData, tokens: int) -> list[Document]:
    """Documents of about `tokens` tokens, spread evenly over the held-out text; all of them where it is shorter.

    Where those chosen have more than twice as many, as of books, they are cut to equal beginnings.
    """
    shards = data.val
    stride = -(-shards.num_tokens // tokens)
    # Without a begin-of-text token nothing stands before a document's first token: the end of another one then does.
    head = [] if data.tokenizer.bos_id is not None else [data.tokenizer.eos_id]
    chosen = range(0, shards.num_documents, stride)
    found = [(shards.document(i), int(shards.document_bytes[i])) for i in chosen]
    if sum(len(ids) for ids, _ in found) > 2 * tokens:
        found = [_beginning(data.tokenizer, ids, size, max(tokens // len(found), 2)) for ids, size in found]
    return [(np.concatenate([head, ids]).astype(np.int64), size) for ids, size in found]


def _beginning(tokenizer: Tokenizer, ids: np.ndarray, size: int, tokens: int) -> Document:
    """The first tokens of a document, and the bytes that they write."""
    if len(ids) <= tokens:
        return ids, size
    return ids[:tokens], sum(len(tokenizer.token_bytes(token)) for token in ids[:tokens].tolist() if token != tokenizer.bos_id)


class Window(NamedTuple):
    """A piece of a document."""

    tokens: np.ndarray
    skip: int
    """Leading targets not to score."""
    before: np.ndarray
    """What stands in front of it in the document."""


def windows(document: np.ndarray, length: int, overlap: int, lookback: int = 0) -> Iterator[Window]:
    """Cut a document of n tokens into windows of at most `length` + 1, with up to `lookback` tokens before each.

    Every token but the first is scored exactly once; from the second window on it has at least `overlap` tokens of context.
    """
    scored, start = 0, 0
    while scored < len(document) - 1:
        window = document[start : start + length + 1]
        yield Window(window, scored - start, document[max(start - lookback, 0) : start])
        scored = start + len(window) - 1
        start = scored - overlap


def likelihood(
    model: Transformer,
    machine: Machine,
    documents: Iterable[Document],
    *,
    window: int,
    overlap: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
    team: Team | None = None,
    run: Callable[[torch.Tensor, torch.Tensor | None], Output | None] | None = None,
) -> Likelihood:
    """Score `documents`: how likely the model holds them.

    `overlap` defaults to half a window. Windows are sorted by length, so that batches waste little on padding.
    `progress` is told the number of tokens scored by every batch. The processes of a `team` score a share each, all in the same call;
    `run` runs a model that is spread over several, and gives None where another process has the result.
    """
    team = team or Team()
    overlap = window // 2 if overlap is None else overlap
    lookback = model.config.looks_back
    pieces: list[Window] = []
    total_bytes = 0
    for tokens, size in documents:
        pieces.extend(windows(np.asarray(tokens), window, overlap, lookback))
        total_bytes += size
    pieces.sort(key=lambda piece: -len(piece.tokens))
    nats, count, at = 0.0, 0, 0
    was_training = model.training
    model.eval()
    with inference(machine) if team.is_alone else divided_inference(machine):
        while at < len(pieces):
            width = len(pieces[at].tokens)
            batch = pieces[at : at + max(1, batch_tokens // width)]
            mine = _share(batch, team)
            ids, targets = _pad(mine, width)
            before = _before(mine, lookback).to(machine.device) if lookback else None
            output = run(ids.to(machine.device), before) if run else model(ids.to(machine.device), before=before)
            at += len(batch)
            if output is None:
                continue
            scored = model.cross_entropy(output.hidden, targets.to(machine.device), output.keys)
            nats += float(scored.nats)
            count += scored.counted
            if progress is not None:
                progress(scored.counted)
    model.train(was_training)
    nats, total = team.sum(torch.tensor([nats, count], dtype=torch.float64)).tolist()
    return Likelihood(nats, int(total), total_bytes)


def _share(batch: list[Window], team: Team) -> list[Window]:
    """This process's part of a batch; where it is too short for all, a row of which nothing is scored: all must take part."""
    if team.is_alone:
        return batch
    first = batch[0]
    return batch[team.data_rank :: team.layout.data] or [first._replace(skip=len(first.tokens))]


def _pad(batch: list[Window], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, `[B, width - 1]`; padding stands at the end, where causal attention keeps it out of sight."""
    ids = np.zeros((len(batch), width - 1), dtype=np.int64)
    targets = np.full((len(batch), width - 1), IGNORED, dtype=np.int64)
    for row, (window, skip, _) in enumerate(batch):
        ids[row, : len(window) - 1] = window[:-1]
        targets[row, skip : len(window) - 1] = window[skip + 1 :]
    return torch.from_numpy(ids), torch.from_numpy(targets)


def _before(batch: list[Window], lookback: int) -> torch.Tensor:
    """`[B, lookback]`, with -1 where nothing is there."""
    before = np.full((len(batch), lookback), -1, dtype=np.int64)
    for row, (_, _, tokens) in enumerate(batch):
        before[row, lookback - len(tokens) :] = tokens
    return torch.from_numpy(before)
