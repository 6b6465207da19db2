"""Multi-token prediction modules (DeepSeek-V3, 2412.19437, section 2.2).

Module k sees, at position i, the representation of depth k - 1 and the embedding of token i + k, and predicts token i + k + 1.
The modules run one after the other and keep the causal chain; embedding and output head are the main model's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .block import Block
from .layers import Linear, RMSNorm
from .moe import Dispatcher


class MTPModule(Block):
    """A decoder layer behind a junction of two streams; layer `num_hidden_layers + k - 1` of official files."""

    def __init__(self, config: ModelConfig, layer: int, dispatcher: Dispatcher) -> None:
        # What main layers look up by token belongs to the token they stand at; here two tokens meet.
        plain = replace(config, embedding_skip=False, value_embedding=False, convolution=0)
        super().__init__(plain, layer, dispatcher)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def join(self, previous: Tensor, embedding: Tensor) -> Tensor:
        """Input of the layer, `[B, T, D]`, from depth k - 1 (depth 1: the main model's normalised output) and the tokens k ahead."""
        # The embedding comes first: that is how the official eh_proj is laid out.
        return self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(previous)], dim=-1))
