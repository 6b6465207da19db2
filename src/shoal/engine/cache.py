"""A contiguous cache for one attention layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ModelConfig


class DenseCache:
    """Values of up to `capacity` positions of `batch` sequences; the position is the index.

    For MLA a value is the latent and the rotary key (kv_lora_rank + qk_rope_head_dim numbers), for GQA keys and values.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device: torch.device) -> None:
        self._values = torch.zeros(batch, capacity, config.cache_values_per_token, device=device)
        self._rows = torch.arange(batch, device=device)[:, None]
        self._seen = 0

    def extend(self, values: Tensor, positions: Tensor) -> Tensor:
        """See `model.LayerCache`."""
        if self._values.dtype != values.dtype:
            self._values = self._values.to(values.dtype)
        self._values[self._rows, positions] = values
        self._seen = max(self._seen, int(positions.max()) + 1)
        return self._values[:, : self._seen]
