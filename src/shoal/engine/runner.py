"""Runs a model over a paged cache: the protocol, and the runner in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import CacheFormat, ModelConfig
from ..model import RoutingStats, Transformer
from ..runtime import Machine, inference
from .batch import PAGE, Batch
from .past import Past
from .race import Races, Room, draw


def take_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of `x [N, D]`, increasing; a view where they are neighbours."""
    first, end = rows[0], rows[-1] + 1
    return x[first:end] if end - first == len(rows) else x[torch.tensor(list(rows), device=x.device)]


def on_host(x: Tensor) -> np.ndarray:
    """`x` for numpy; without a copy where it is in the host's memory."""
    return x.numpy() if x.is_cpu else x.cpu().numpy()


@dataclass
class Forward:
    """Result of a step of the main model."""

    hidden: Tensor
    """`[N, D]` fp32, after the final norm."""
    experts: Tensor | None
    """`[MoE layers, N, K]` int: who was chosen; None for dense models."""
    keys: Tensor | None = None
    """What `logits` looks up for every prediction, `[N, K]`; None for models that look nothing up."""

    def predictions(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """What `Runner.logits` takes, of some rows, increasing."""
        return take_rows(self.hidden, rows), None if self.keys is None else take_rows(self.keys, rows)


@dataclass
class Guesses:
    """What multi-token prediction says of S sequences."""

    tokens: list[list[int]]
    """As many of each sequence as were wanted, fewer where logits were no numbers."""
    logits: Tensor
    """`[n, V]` fp32: what the first guesses of the n sequences that wanted some were drawn from."""


class Runner(Protocol):
    """Holds weights and the paged cache, `[layers + MTP layers, pages, PAGE, C]` with C = `config.cache_values_per_token`.

    A sequence's results do not depend on what else is in the batch.
    """

    config: ModelConfig
    device: torch.device
    """Where hidden states and logits lie."""
    natural_cache: CacheFormat
    """The format of the cache that fits the precision the model computes in."""

    def allocate(self, pages: int, cache: CacheFormat) -> None:
        """Make room for a cache; what an earlier one held is lost."""
        ...

    def forward(self, batch: Batch) -> Forward:
        """Run the main model, write the caches of its layers."""
        ...

    def logits(self, hidden: Tensor, keys: Tensor | None = None) -> Tensor:
        """`[M, D]` -> `[M, V]` fp32; `keys` are those of the same rows of `Forward`."""
        ...

    def guess(self, batch: Batch, hidden: Tensor, next_ids: Tensor, races: Races) -> Guesses:
        """Run MTP module 1, write its cache, and guess the tokens that come after.

        `hidden [N, D]` is the main model's at the batch's positions, `next_ids [N]` the token after each. The first guess of a
        sequence is drawn from what the module makes of its last position, the others from what it makes of its own output and guesses;
        the batch's tables have the pages of those.
        """
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in all layers."""
        ...


class Drafting(Protocol):
    """What `guess_step_by_step` needs."""

    def draft(self, batch: Batch, hidden: Tensor, next_ids: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor, keys: Tensor | None = None) -> Tensor: ...


def guess_step_by_step(runner: Drafting, batch: Batch, hidden: Tensor, next_ids: Tensor, races: Races) -> Guesses:
    """`Runner.guess`, made of single passes and draws."""
    made = runner.draft(batch, hidden, next_ids)
    last = batch.starts[1:] - 1
    guessing = [i for i, starts in enumerate(races.starts) if starts]
    tokens: list[list[int]] = [[] for _ in races.starts]
    rows = made[last[guessing]]
    first = logits = runner.logits(rows) if guessing else made.new_empty(0)
    before = next_ids[last]
    room = Room()
    for depth in range(max(map(len, races.starts), default=0)):
        table, heats = on_host(logits), [races.temperatures[i] for i in guessing]
        winners = draw(table, range(len(table)), heats, [races.starts[i][depth] for i in guessing], room)
        for i, winner in zip(guessing, winners, strict=True):
            tokens[i] += [winner] if winner >= 0 else []
        keep = [row for row, i in enumerate(guessing) if depth + 1 == len(tokens[i]) < len(races.starts[i])]
        if not keep:
            break
        guessing = [guessing[row] for row in keep]
        at = torch.tensor(guessing)
        step = Batch(before[at], batch.positions[last[at]] + depth + 1, torch.arange(len(keep) + 1), batch.tables[at])
        before[at] = torch.tensor([tokens[i][-1] for i in guessing])
        rows = runner.draft(step, rows[keep], before[at])
        logits = runner.logits(rows)
    return Guesses(tokens, first)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}
"""How the cache is kept: fp8 as bytes, because torch cannot index that type everywhere."""


class PagedLayer:
    """One sequence's cache in one layer (see `model.LayerCache`)."""

    def __init__(self, pages: Tensor, table: Tensor, seen: int) -> None:
        self._pages, self._table, self._seen = pages, table, seen

    def extend(self, values: Tensor, positions: Tensor) -> Tensor:
        """`values [1, T, C]` at `positions [1, T]` -> everything up to the last position, `[1, S, C]`; there may be room for more."""
        at, width = positions[0], values.shape[-1]
        self._pages[self._table[at // PAGE], at % PAGE, :width] = encode(values[0], self._pages.dtype)
        kept = self._pages[self._table[: -(-self._seen // PAGE)]].flatten(0, 1)[: self._seen, :width]
        return decode(kept).to(values.dtype).unsqueeze(0)


def encode(values: Tensor, stored: torch.dtype) -> Tensor:
    """Values as the cache stores them."""
    if stored != torch.uint8:
        return values.to(stored)
    largest = torch.finfo(torch.float8_e4m3fn).max
    return values.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)


def decode(kept: Tensor) -> Tensor:
    return kept.view(torch.float8_e4m3fn) if kept.dtype == torch.uint8 else kept


class TorchRunner:
    """Runs a `Transformer` one sequence after the other: the specification, and what runs where the C++ one does not."""

    def __init__(self, model: Transformer, machine: Machine) -> None:
        self.model, self.machine, self.config, self.device = model.eval(), machine, model.config, machine.device
        self.natural_cache: CacheFormat = "bf16" if machine.precision == "bf16" else "fp32"
        self._cache = torch.empty(0)
        self._past: Past | None = None

    def allocate(self, pages: int, cache: CacheFormat) -> None:
        """See `Runner`. On a CPU, memory is taken only as pages are written."""
        self._past = Past(pages, self.config.looks_back, self.device) if self.config.looks_back else None
        shape, dtype = (len(self.model.model.layers), pages, PAGE, self.config.cache_values_per_token), DTYPES[cache]
        if self.device.type == "cpu":
            self._cache = torch.from_numpy(np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)).view(dtype)
        else:
            self._cache = torch.zeros(shape, dtype=dtype, device=self.device)

    def forward(self, batch: Batch) -> Forward:
        """See `Runner`."""
        hidden, experts, keys = [], [], []
        with inference(self.machine):
            before = None if self._past is None else self._past.before(batch)
            for i, (ids, positions, caches) in enumerate(self._sequences(batch)):
                output = self.model(ids[None], positions[None], caches, before=None if before is None else before[i : i + 1])
                hidden.append(output.hidden[0])
                experts.append(_chosen(output.routing))
                keys.append(None if output.keys is None else output.keys[0])
        return Forward(torch.cat(hidden).float(), _together(experts, 1), _together(keys, 0))

    def logits(self, hidden: Tensor, keys: Tensor | None = None) -> Tensor:
        """See `Runner`."""
        with inference(self.machine):
            # Row by row: how a matrix product rounds depends on the number of its rows.
            looked_up = [None] * len(hidden) if keys is None else keys.split(1)
            return torch.cat([self.model.logits(*row) for row in zip(hidden.split(1), looked_up, strict=True)])

    def guess(self, batch: Batch, hidden: Tensor, next_ids: Tensor, races: Races) -> Guesses:
        """See `Runner`."""
        return guess_step_by_step(self, batch, hidden, next_ids, races)

    def draft(self, batch: Batch, hidden: Tensor, next_ids: Tensor) -> Tensor:
        """One pass of MTP module 1: `[N, D]` after its norm, whose `logits` predict the token after the next."""
        shifted = next_ids.to(self.device)
        drafts, starts = [], batch.starts.tolist()
        with inference(self.machine):
            for i, (ids, positions, caches) in enumerate(self._sequences(batch)):
                rows = slice(starts[i], starts[i + 1])
                drafts.append(self.model.ahead(1, hidden[None, rows], shifted[None, rows], ids[None], positions[None], caches)[0])
        return torch.cat(drafts).float()

    def copy_page(self, source: int, target: int) -> None:
        """See `Runner`."""
        self._cache[:, target] = self._cache[:, source]
        if self._past is not None:
            self._past.copy_page(source, target)

    def _sequences(self, batch: Batch) -> list[tuple[Tensor, Tensor, list[PagedLayer]]]:
        """Ids, positions and caches of every sequence, on the device."""
        device, starts = self.device, batch.starts.tolist()
        ids, positions, tables = (tensor.to(device) for tensor in (batch.ids, batch.positions, batch.tables.long()))
        ends = batch.positions[batch.starts[1:] - 1].tolist()
        return [
            (
                ids[starts[i] : starts[i + 1]],
                positions[starts[i] : starts[i + 1]],
                [PagedLayer(layer, tables[i], ends[i] + 1) for layer in self._cache],
            )
            for i in range(len(starts) - 1)
        ]


def _together(parts: list[Tensor | None], dimension: int) -> Tensor | None:
    """What the sequences have of something that either all have or none."""
    there = [part for part in parts if part is not None]
    return torch.cat(there, dimension) if there else None


def _chosen(routing: list[RoutingStats]) -> Tensor | None:
    """`[MoE layers, T, K]` of one sequence."""
    return torch.cat([stats.indices for stats in routing]) if routing else None
