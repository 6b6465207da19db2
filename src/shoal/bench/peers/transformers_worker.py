"""transformers as one side of `shoal bench engine`, in a process of its own (see `loop`).

Its forward pass is called directly with a key-value cache, which spares it the overhead of `generate`.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from loop import serve

EXPERTS = ("eager", "grouped_mm", "batched_mm")
TRIAL, TRIAL_PROMPT = 8, 128
"""Tokens that each way of running is tried with: added one by one, and read at once."""


def empty_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


class Side:
    """What can be asked for; `loop.serve` names the requests after the methods."""

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Find the fastest of fp32 and bf16, with each way of running the experts that the model has, for decoding and for prefill."""
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        began = time.perf_counter()
        ways = []
        for dtype in (torch.float32, torch.bfloat16):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
            for experts in EXPERTS:
                try:
                    loaded.set_experts_implementation(experts)
                    reading = min(self._read(loaded, list(range(TRIAL_PROMPT))) for _ in range(2))
                    decoding = statistics.median(self._steps(loaded, [[1]] * TRIAL, None))
                except (ValueError, AttributeError, NotImplementedError, RuntimeError):
                    continue  # not every version and model has every implementation
                ways.append((decoding, reading, loaded, experts))
        self.decoder, self.reader = (min(ways, key=lambda way: way[i])[2:] for i in (0, 1))
        self.filled: tuple[int, int] = (0, 0)
        names = [f"{str(way[0].dtype).removeprefix('torch.')} with {way[1]} experts" for way in (self.decoder, self.reader)]
        settings = f"transformers {transformers.__version__}, decoding in {names[0]}, prefill in {names[1]}, {threads} threads"
        return {"load_seconds": time.perf_counter() - began, "settings": settings, "vocab": loaded.config.vocab_size}

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        model = self._ready(self.reader)
        return {"seconds": [self._read(model, ids)]}

    @staticmethod
    def _read(model: Any, ids: list[int]) -> float:
        began = time.perf_counter()
        out = model(input_ids=torch.tensor([ids]), past_key_values=empty_cache(), use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - began

    @staticmethod
    def _ready(way: tuple[Any, str]) -> Any:
        model, experts = way
        model.set_experts_implementation(experts)
        return model

    def decode(self, prefix: list[int], context: int, ids: list[list[int]], warm: int) -> dict[str, Any]:
        model, sequences = self._ready(self.decoder), len(ids[0])
        if self.filled != (context, sequences):
            self.cache = empty_cache()
            known = (prefix * -(-context // len(prefix)))[:context]
            for start in range(0, context, 512):
                rows = torch.tensor([known[start : start + 512]] * sequences)
                model(input_ids=rows, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.filled = (context, sequences)
        warmed = self._steps(model, ids[:warm], self.cache)
        self.cache.crop(-len(warmed))
        seconds = self._steps(model, ids, self.cache)
        self.cache.crop(-len(seconds))
        return {"seconds": seconds}

    def _steps(self, model: Any, ids: list[list[int]], cache: Any) -> list[float]:
        cache = empty_cache() if cache is None else cache
        seconds = []
        for row in ids:
            began = time.perf_counter()
            out = model(input_ids=torch.tensor([[token] for token in row]), past_key_values=cache, use_cache=True)
            out.logits[:, -1].argmax(-1).tolist()
            seconds.append(time.perf_counter() - began)
        return seconds


if __name__ == "__main__":
    side = Side()
    serve({name: getattr(side, name) for name in ("load", "prefill", "decode")})
