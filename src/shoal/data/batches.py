"""Packed documents as batches: every token once an epoch, in an order that depends on the seed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..config import UserError
from .shards import TokenShards


class Batches:
    """An endless sequence of batches, of which each rank reads its part.

    Every epoch the documents are shuffled and laid end to end. Row w of that stream is its tokens from w * sequence_length on,
    `sequence_length + lookahead` of them: `lookahead` is how far beyond its input the model is asked to see (1 for
    the next token, one more per multi-token prediction module). `lookback` tokens of the stream stand in front of it, -1 before its
    beginning, for models that look farther back than the row. The rows are shuffled too, because a document may fill many.
    Batch s holds rows [s * batch_size, (s + 1) * batch_size) of that order, whatever the number of ranks; what is left at the end
    of an epoch, less than a batch, is dropped. Order costs memory for two integers per document and one per row, once an epoch.
    """

    def __init__(
        self,
        tokens: TokenShards,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        lookahead: int = 1,
        lookback: int = 0,
        parts: int = 1,
    ) -> None:
        """`batch_size` is in sequences per step over all `world` ranks; `tokens` are one of so many equal `parts` of the data.

        Raises `UserError` if it does not divide among them, or if there are too few tokens for one batch.
        """
        if batch_size % world:
            raise UserError(f"batch_size {batch_size} does not divide among {world} processes: make it a multiple of {world}")
        self.num_rows = max(0, (tokens.num_tokens - lookahead) // sequence_length)
        if self.num_rows < batch_size:
            needed = batch_size * sequence_length + lookahead
            about, of_each = ("about ", f" from each of {parts} parts") if parts > 1 else ("", "")
            raise UserError(
                f"the data holds {about}{parts * tokens.num_tokens} tokens, but one batch of {batch_size} sequences of {sequence_length}"
                f"{of_each} needs {parts * needed}: give more data, or lower batch_size or sequence_length"
            )
        self._tokens = tokens
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._columns = np.arange(-lookback, sequence_length + lookahead)
        self._seed = seed
        self._begin_epoch(0)

    def next(self) -> torch.Tensor:
        """This rank's part of the next batch: int64 [batch_size / world, lookback + sequence_length + lookahead]."""
        if self._row + self._batch_size > self.num_rows:
            self._begin_epoch(self.epoch + 1)
        rows = self._row_order[self._row : self._row + self._batch_size][self._share]
        self._row += self._batch_size
        positions = rows[:, None] * self._sequence_length + self._columns
        there = np.maximum(positions, 0)
        document = np.searchsorted(self._starts, there, side="right") - 1
        found = self._tokens.tokens[there + self._moved[document]].astype(np.int64)
        return torch.from_numpy(np.where(positions < 0, -1, found))

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence of batches stands: small, and the same on every rank."""
        return {
            "seed": self._seed,
            "epoch": self.epoch,
            "row": self._row,
            "num_rows": self.num_rows,
            "sequence_length": self._sequence_length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any number of ranks. Raises `UserError` if the rows are not the same."""
        for name, value in (("num_rows", self.num_rows), ("sequence_length", self._sequence_length)):
            if state[name] != value:
                raise UserError(f"the run read data with {name} {state[name]}, now it is {value}: resume with the same data and settings")
        self._seed = state["seed"]
        self._begin_epoch(state["epoch"])
        self._row = state["row"]

    def _begin_epoch(self, epoch: int) -> None:
        """Draw the order of documents and rows."""
        draw = np.random.default_rng([self._seed % 2**64, epoch])  # NumPy takes no negative seed
        order = draw.permutation(self._tokens.num_documents)
        lengths = np.diff(self._tokens.documents)[order]
        self._starts = np.cumsum(lengths) - lengths  # where each document begins in the shuffled stream
        self._moved = self._tokens.documents[order] - self._starts  # from there to where it begins on disk
        self._row_order = draw.permutation(self.num_rows)
        self._row = 0
        self.epoch = epoch
