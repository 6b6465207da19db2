"""Shoal as one side of `shoal bench engine`, in a process of its own (see `loop`): the engine's runner, without the scheduler around it."""

from __future__ import annotations

import mmap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loop import serve

from shoal.bench.machine import Reader
from shoal.config import CacheFormat, EngineOptions, SamplingOptions
from shoal.engine import Engine
from shoal.engine.batch import PAGE, Batch
from shoal.engine.native import NativeRunner
from shoal.engine.paging import touched_bytes
from shoal.engine.requests import Request
from shoal.engine.runner import DTYPES
from shoal.engine.weights import Weights, load_weights
from shoal.formats.parts import arrays_of
from shoal.kernels.packed import PackedMatrix

MARGIN = 256
"""Positions beyond the context of a case, for the tokens that it decodes."""
PAUSE = 0.005
"""Seconds in which torch's threads, which have read, go to sleep: a core that waits busily is not free for a step."""


class Side:
    """What can be asked for; `loop.serve` names the requests after the methods."""

    def load(self, model: str, threads: int, bits: int | None, group: int, precision: str, cache: str) -> dict[str, Any]:
        torch.set_num_threads(threads)
        began = time.perf_counter()
        weights = load_weights(Path(model), bits, group, precision=precision)
        self.runner = NativeRunner(weights.config, weights.parts, threads)
        self.cache: CacheFormat = self.runner.natural_cache if cache == "auto" else cache  # type: ignore[assignment]
        self.positions, self.filled = 0, (0, 0)
        self.make_room(MARGIN)
        seconds = time.perf_counter() - began
        if not self.runner.settle():  # what happens in the background of a server's first seconds
            touch(weights)
        width = DTYPES[self.cache].itemsize
        config = weights.config
        settings = f"{weights.scheme.matrices}, cache in {self.cache}, {threads} threads"
        return {
            "load_seconds": seconds,
            "settings": settings,
            "vocab": config.vocab_size,
            "weight_bytes_per_token": sum(touched_bytes(weights)),
            "cache_bytes_per_position": config.num_hidden_layers * config.cache_values_per_token * width,
        }

    def make_room(self, positions: int) -> None:
        """A cache for so many positions in all sequences together; what it held is lost where it has to grow."""
        if positions > self.positions:
            self.runner.allocate(-(-positions // PAGE), self.cache)
            self.positions, self.filled = positions, (0, 0)

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        self.make_room(len(ids))
        self.filled = (0, 0)
        table = np.arange(-(-len(ids) // PAGE), dtype=np.int32)
        began = time.perf_counter()
        forward = self.runner.forward(Batch.lay_out([ids], [0], [table]))
        self.runner.logits(*forward.predictions([len(ids) - 1])).argmax(-1).tolist()
        return {"seconds": [time.perf_counter() - began]}

    def decode(self, prefix: list[int], context: int, ids: list[list[int]], warm: int) -> dict[str, Any]:
        tables = self.ready(prefix, context, ids, warm)
        return {"seconds": self.steps(ids, context, tables)}

    def decode_and_read(self, prefix: list[int], context: int, ids: list[list[int]], warm: int) -> dict[str, Any]:
        """`decode`, and `bandwidth`: what can be read from memory before the first step and after each."""
        tables = self.ready(prefix, context, ids, warm)
        reader = Reader()
        seconds, bandwidth = [], [reader.rate()]
        for step, row in enumerate(ids):
            time.sleep(PAUSE)
            seconds += self.steps([row], context + step, tables)
            bandwidth.append(reader.rate())
        return {"seconds": seconds, "bandwidth": bandwidth}

    def ready(self, prefix: list[int], context: int, ids: list[list[int]], warm: int) -> list[np.ndarray]:
        """Page tables of the sequences, which hold `context` positions from now on, after `warm` steps that do not count."""
        sequences, pages = len(ids[0]), -(-(context + MARGIN) // PAGE)
        self.make_room(sequences * pages * PAGE)
        tables = [np.arange(pages, dtype=np.int32) + s * pages for s in range(sequences)]
        self.fill(prefix, context, tables)
        self.steps(ids[:warm], context, tables)
        return tables

    def fill(self, prefix: list[int], context: int, tables: list[np.ndarray]) -> None:
        """Let every sequence hold `context` positions: the cache of `prefix`, computed once, over and over again."""
        if self.filled == (context, len(tables)):
            return
        known = prefix[:context]
        self.prefill(known)
        full = len(known) // PAGE
        for s, table in enumerate(tables):
            for place in range(-(-context // PAGE)):
                if s or place >= -(-len(known) // PAGE):
                    self.runner.copy_page(int(tables[0][place % full]), int(table[place]))
        self.filled = (context, len(tables))

    def steps(self, ids: list[list[int]], start: int, tables: list[np.ndarray]) -> list[float]:
        """Seconds of each step: `ids[s]` are the next token of every sequence."""
        seconds = []
        for step, row in enumerate(ids):
            began = time.perf_counter()
            batch = Batch.lay_out([[token] for token in row], [start + step] * len(row), tables)
            forward = self.runner.forward(batch)
            self.runner.logits(*forward.predictions(range(len(row)))).argmax(-1).tolist()
            seconds.append(time.perf_counter() - began)
        return seconds

    def answer(self, prompts: list[list[int]], tokens: int, speculate: str) -> dict[str, Any]:
        """Greedy answers to the prompts, one after the other: of each the seconds after its first token, guesses checked and right."""
        options = EngineOptions(speculate=speculate, cache=self.cache, cache_tokens=4096, prefix_cache=False)  # type: ignore[arg-type]
        engine = Engine(self.runner, None, options)
        greedy = SamplingOptions(max_tokens=tokens, temperature=0, ignore_eos=True)
        engine.run([Request(prompts[0], replace(greedy, max_tokens=4))])
        reply: dict[str, list[Any]] = {"seconds": [], "accepted": [], "drafted": [], "answers": []}
        for prompt in prompts:
            before = engine.stats()
            engine.add_request(Request(prompt, greedy))
            made = [token.id for token in next(iter(engine.step().values())).tokens]
            began = time.perf_counter()
            while engine.has_work:
                made += [token.id for increment in engine.step().values() for token in increment.tokens]
            reply["seconds"].append(time.perf_counter() - began)
            after = engine.stats()
            reply["accepted"].append(after.accepted_tokens - before.accepted_tokens)
            reply["drafted"].append(after.drafted_tokens - before.drafted_tokens)
            reply["answers"].append(made)
        self.positions, self.filled = 0, (0, 0)
        return reply


def touch(weights: Weights) -> None:
    """Read a byte of every page that decoding may need, so that no turn waits for the disk or for page faults.

    Of the embedding only the rows that occur are ever read: it is left alone.
    """
    for part in weights.parts.values():
        if isinstance(part, PackedMatrix):
            for array in arrays_of(part).values():
                array.flatten().view(torch.uint8)[:: mmap.PAGESIZE].sum()


if __name__ == "__main__":
    side = Side()
    serve({name: getattr(side, name) for name in ("load", "prefill", "decode", "decode_and_read", "answer")})
