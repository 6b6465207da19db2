"""llama.cpp as one side of `shoal bench engine`, in a process of its own (see `loop`).

Stands alone (standard library, numpy, llama_cpp), so that it can run under another Python than Shoal's. Batches go straight to
llama_decode: no sampler, no Python per token beyond the call and the argmax.
"""

from __future__ import annotations

import ctypes
import struct
import time
from typing import Any

import llama_cpp as ll
import numpy as np
from loop import serve

CHUNK = 512
"""Tokens of a prompt that go into one call."""
MARGIN = 256
"""Positions beyond the context of a case, for the tokens that it decodes."""


class Llama:
    """A loaded model; every shape of cache that a case needs is made once and keeps what it holds."""

    def __init__(self, model: str, threads: int, flash: int) -> None:
        ll.llama_backend_init()
        self._log = ll.llama_log_callback(lambda level, text, data: None)
        ll.llama_log_set(self._log, None)
        params = ll.llama_model_default_params()
        params.load_mtp = False
        params.load_mode = ll.LLAMA_LOAD_MODE_NONE
        began = time.perf_counter()
        self.model = ll.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self.load_seconds = time.perf_counter() - began
        self.vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.threads, self.flash = threads, flash
        self.caches: dict[tuple[int, int], Cache] = {}

    def cache(self, length: int, sequences: int = 1) -> Cache:
        """The cache for `sequences` of `length` tokens and some more."""
        shape = ((length + MARGIN + 255) // 256 * 256, sequences)
        if shape not in self.caches:
            self.caches[shape] = Cache(self, *shape)
        return self.caches[shape]


class Cache:
    """A context of llama.cpp with what it has read so far."""

    def __init__(self, llama: Llama, length: int, sequences: int) -> None:
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * sequences, sequences
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = llama.threads
        params.flash_attn_type = llama.flash
        params.kv_unified = False
        params.no_perf = True
        self.context = ll.llama_init_from_model(llama.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context: is there too little memory?")
        self.memory = ll.llama_get_memory(self.context)
        self.vocab, self.sequences, self.filled = llama.vocab, sequences, 0

    def decode(self, ids: list[int], positions: list[int], sequences: list[int], outputs: list[bool]) -> None:
        """One call of llama_decode."""
        count = len(ids)
        batch = ll.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i in range(count):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = ids[i], positions[i], 1
            batch.seq_id[i][0], batch.logits[i] = sequences[i], outputs[i]
        code = ll.llama_decode(self.context, batch)
        ll.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode failed with code {code}")

    def logits(self, row: int) -> np.ndarray:
        """The logits of a token of the last call, `[vocabulary]`."""
        return np.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, row), (self.vocab,))

    def prefill(self, ids: list[int]) -> float:
        """Seconds to read `ids` into sequence 0 of an empty cache, up to the choice of the next token."""
        ll.llama_memory_clear(self.memory, False)
        began = time.perf_counter()
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            last = start + len(part) == len(ids)
            positions = list(range(start, start + len(part)))
            self.decode(part, positions, [0] * len(part), [False] * (len(part) - 1) + [last])
        self.logits(-1).argmax()
        seconds = time.perf_counter() - began
        self.filled = len(ids)
        return seconds

    def fill(self, ids: list[int], length: int) -> None:
        """Let every sequence hold `length` positions: the cache of `ids`, computed once, over and over again.

        Reading 16K tokens would take longer than all measurements; how long a step takes does not depend on what is cached.
        """
        if self.filled == length:
            return
        self.prefill(ids[:length])
        if length > len(ids):
            state = tile_state(self.save(), length)
            ll.llama_memory_clear(self.memory, False)
            data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
            if ll.llama_state_seq_set_data(self.context, data, len(state), 0) == 0:
                raise RuntimeError("llama.cpp does not take the cache back")
        for sequence in range(1, self.sequences):
            ll.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        self.filled = length

    def save(self) -> bytes:
        size = ll.llama_state_seq_get_size(self.context, 0)
        data = (ctypes.c_uint8 * size)()
        return bytes(data[: ll.llama_state_seq_get_data(self.context, data, size, 0)])

    def steps(self, ids: list[list[int]]) -> list[float]:
        """Seconds of each step: `ids[s]` are the next token of every sequence. The cache is as before afterwards."""
        seconds = []
        for step, row in enumerate(ids):
            began = time.perf_counter()
            self.decode(row, [self.filled + step] * len(row), list(range(len(row))), [True] * len(row))
            for i in range(len(row)):
                self.logits(i).argmax()
            seconds.append(time.perf_counter() - began)
        for sequence in range(self.sequences):
            ll.llama_memory_seq_rm(self.memory, sequence, self.filled, -1)
        return seconds


def tile_state(state: bytes, length: int) -> bytes:
    """A saved sequence (llama_kv_cache::state_write) with its cells repeated to `length` positions."""
    offset = 0

    def take(form: str) -> Any:
        nonlocal offset
        values = struct.unpack_from("<" + form, state, offset)
        offset += struct.calcsize("<" + form)
        return values if len(values) > 1 else values[0]

    magic, sequence, streams, cells = take("iiII")
    assert streams == 1, "only a context of one sequence can be repeated"
    seen = [take("iIi") for _ in range(cells)]
    assert all(count == 1 for _, count, _ in seen)
    transposed, layers = take("II")
    times = -(-length // cells)
    out = [struct.pack("<iiII", magic, sequence, streams, length)]
    out += [struct.pack("<iIi", position, 1, 0) for position in range(length)]
    out.append(struct.pack("<II", transposed, layers))
    while offset < len(state):
        assert not transposed or len(out) < length + 2 + layers, "values lie transposed: use flash attention"
        kind, row = take("iQ")
        rows = state[offset : offset + row * cells]
        offset += row * cells
        out.append(struct.pack("<iQ", kind, row) + (rows * times)[: row * length])
    return b"".join(out)


class Side:
    """What can be asked for; `loop.serve` names the requests after the methods."""

    llama: Llama

    def load(self, **options: Any) -> dict[str, Any]:
        self.llama = Llama(**options)
        info = ll.llama_print_system_info().decode()
        flash = {-1: "flash attention auto", 0: "flash attention off", 1: "flash attention on"}[self.llama.flash]
        settings = f"llama-cpp-python {ll.__version__}, {self.llama.threads} threads, {flash}, batches of {CHUNK}, repacked, no mmap"
        return {"load_seconds": self.llama.load_seconds, "settings": settings, "info": info, "vocab": self.llama.vocab}

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        return {"seconds": [self.llama.cache(len(ids)).prefill(ids)]}

    def decode(self, prefix: list[int], context: int, ids: list[list[int]], warm: int) -> dict[str, Any]:
        cache = self.llama.cache(context, len(ids[0]))
        cache.fill(prefix, context)
        cache.steps(ids[:warm])
        return {"seconds": cache.steps(ids)}

    def nats(self, windows: list[list[int]]) -> dict[str, Any]:
        """Sum of -log p of every token of every window but its first."""
        total = 0.0
        for ids in windows:
            cache = self.llama.cache(len(ids))
            ll.llama_memory_clear(cache.memory, False)
            cache.filled = 0
            for start in range(0, len(ids), CHUNK):
                part = ids[start : start + CHUNK]
                cache.decode(part, list(range(start, start + len(part))), [0] * len(part), [True] * len(part))
                for i, target in enumerate(ids[start + 1 : start + len(part) + 1]):
                    row = cache.logits(i).astype(np.float64)
                    top = row.max()
                    total += top + np.log(np.exp(row - top).sum()) - row[target]
        return {"nats": float(total)}

    def quantize(self, source: str, out: str, kind: int) -> dict[str, Any]:
        """What llama.cpp's own quantizer makes of a file."""
        params = ll.llama_model_quantize_default_params()
        params.ftype = kind
        code = ll.llama_model_quantize(source.encode(), out.encode(), params)
        if code:
            raise RuntimeError(f"llama_model_quantize failed with code {code}")
        return {}


if __name__ == "__main__":
    side = Side()
    serve({name: getattr(side, name) for name in ("load", "prefill", "decode", "nats", "quantize")})
