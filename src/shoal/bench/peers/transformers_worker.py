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
TRIAL = 8
"""Tokens that each way of running is tried with."""


def empty_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


class Side:
    """What can be asked for; `loop.serve` names the requests after the methods."""

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Keep the fastest of fp32 and bf16, with each way of running the experts that the model has."""
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        began = time.perf_counter()
        best = float("inf")
        for dtype in (torch.float32, torch.bfloat16):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
            for experts in EXPERTS:
                try:
                    loaded.set_experts_implementation(experts)
                    seconds = statistics.median(self._steps(loaded, [[1]] * TRIAL, None))
                except (ValueError, AttributeError, NotImplementedError, RuntimeError):
                    continue  # not every version and model has every implementation
                if seconds < best:
                    best, self.model, self.experts = seconds, loaded, experts
        self.model.set_experts_implementation(self.experts)
        self.filled: tuple[int, int] = (0, 0)
        dtype_name = str(self.model.dtype).removeprefix("torch.")
        settings = f"transformers {transformers.__version__}, {dtype_name}, {self.experts} experts, {threads} threads"
        return {"load_seconds": time.perf_counter() - began, "settings": settings, "vocab": self.model.config.vocab_size}

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        began = time.perf_counter()
        out = self.model(input_ids=torch.tensor([ids]), past_key_values=empty_cache(), use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1).tolist()
        return {"seconds": [time.perf_counter() - began]}

    def decode(self, prefix: list[int], context: int, ids: list[list[int]], warm: int) -> dict[str, Any]:
        sequences = len(ids[0])
        if self.filled != (context, sequences):
            self.cache = empty_cache()
            known = (prefix * -(-context // len(prefix)))[:context]
            for start in range(0, context, 512):
                rows = torch.tensor([known[start : start + 512]] * sequences)
                self.model(input_ids=rows, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.filled = (context, sequences)
        warmed = self._steps(self.model, ids[:warm], self.cache)
        self.cache.crop(-len(warmed))
        seconds = self._steps(self.model, ids, self.cache)
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
