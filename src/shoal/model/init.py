"""Initial weights."""

from __future__ import annotations

import torch
from torch import nn

from .convolution import ShortConvolution
from .counted import CountedNgrams
from .embedding_skip import EmbeddingSkip
from .layers import RMSNorm, TokenTable
from .moe import Experts, Router
from .ngrams import Ngrams
from .repeats import Repeats
from .transformer import Transformer

OUTPUT_PROJECTIONS = ("o_proj", "down_proj")


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill every parameter from `seed`, as `config.init`, `initializer_range` and `zero_init_output` say.

    `fan_in` draws hidden matrices with std 1/sqrt(fan in) and embeddings with std 1; `normal` draws everything with std
    `initializer_range`, as the official models do. The head always has std `initializer_range`, and is 0 where counted n-grams predict.
    """
    config = model.config
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(weight: torch.Tensor, std: float) -> None:
        weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))

    def matrix(name: str, weight: torch.Tensor) -> None:
        if config.zero_init_output and name.rsplit(".", 1)[-1] in OUTPUT_PROJECTIONS:
            weight.zero_()
        else:
            normal(weight, weight.shape[-1] ** -0.5 if config.init == "fan_in" else config.initializer_range)

    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, Ngrams | TokenTable | ShortConvolution):
            module.weight.zero_()
        elif isinstance(module, EmbeddingSkip | Repeats):
            module.reset()
        elif isinstance(module, CountedNgrams):
            module.trust.zero_()
            module.trust_in_length.zero_()
        elif isinstance(module, nn.Embedding):
            normal(module.weight, 1.0 if config.init == "fan_in" and not config.tie_word_embeddings else config.initializer_range)
        elif isinstance(module, Router):
            matrix(name, module.weight)
        elif isinstance(module, Experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                matrix(f"{name}.{part}", getattr(module, part))
        elif module is model.lm_head:
            if config.count_order:
                model.lm_head.weight.zero_()  # begin with what was counted
            elif not config.tie_word_embeddings:
                normal(model.lm_head.weight, config.initializer_range)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            matrix(name, module.weight)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
