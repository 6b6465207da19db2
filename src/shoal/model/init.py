"""Initial weights."""

from __future__ import annotations

import torch
from torch import nn

from .attention import GQA
from .convolution import ShortConvolution
from .copying import begin_copying
from .counted import CountedNgrams
from .embedding_skip import EmbeddingSkip
from .layers import RMSNorm, TokenTable
from .moe import Experts, Router
from .ngrams import Ngrams
from .repeats import Repeats
from .rope import inverse_frequencies, softmax_scale
from .transformer import Transformer

OUTPUT_PROJECTIONS = ("o_proj", "down_proj")


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill every parameter from `seed`, as `config.init`, `initializer_range` and `zero_init_output` say.

    `fan_in` draws hidden matrices with std 1/sqrt(fan in) and embeddings with std 1; `normal` draws everything with std
    `initializer_range`, as the official models do. `anchored` is `fan_in` with anchors (`anchor`), and `copying` is `anchored` with a head
    that finds repetitions (`copying.begin_copying`). The output head always has std `initializer_range`, and is 0 where counted n-grams
    predict.
    """
    config = model.config
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(weight: torch.Tensor, std: float) -> None:
        weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))

    def matrix(name: str, weight: torch.Tensor) -> None:
        if config.zero_init_output and name.rsplit(".", 1)[-1] in OUTPUT_PROJECTIONS:
            weight.zero_()
        else:
            normal(weight, config.initializer_range if config.init == "normal" else weight.shape[-1] ** -0.5)

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
            normal(module.weight, config.initializer_range if config.init == "normal" or config.tie_word_embeddings else 1.0)
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
    if config.init in ("anchored", "copying"):
        anchor(model)
    if config.init == "copying":
        begin_copying(model, generator)


ENERGY = 0.75
"""Of an embedding, what its constant channel has."""
KEY, SHARPNESS = 2.0, 4.0
"""Length of the constant keys in every pair of channels, and what a pair adds to the attention logit of the token looked at."""


def anchor(model: Transformer) -> None:
    """Give every token the same large number in its first channel, and let attention begin by looking at the tokens before.

    A constant channel is a bias for every matrix that reads the stream: logits begin with how frequent a token is, routers and gates
    have thresholds. Rotary keys that read nothing else do not depend on the token, so that the angle between a query and a key is their
    distance: head h of every layer begins by looking at the token h + 1 places back (MLA: with its rotary channels; the others are
    drawn as ever). Everything is learned on from there. Compressed queries and modules of multi-token prediction begin as ever.
    """
    config = model.config
    embedding = model.model.embed_tokens.weight
    scale = config.initializer_range if config.tie_word_embeddings else 1.0
    embedding[:, 0] = scale * (ENERGY / (1 - ENERGY) * (config.hidden_size - 1)) ** 0.5
    constant = (ENERGY * config.hidden_size) ** 0.5  # behind a norm
    angles = inverse_frequencies(config)
    for block in model.blocks:
        attention = block.self_attn
        turns = (torch.arange(attention.heads)[:, None] + 1) * angles  # [H, P / 2]
        queries = SHARPNESS / softmax_scale(config) / KEY / constant * torch.stack([turns.cos(), -turns.sin()], dim=1)  # [H, 2, P / 2]
        if isinstance(attention, GQA):
            query, key = (projection.get_parameter("weight").zero_() for projection in (attention.q_proj, attention.k_proj))
            # Pairs are (i, i + P / 2).
            key.unflatten(0, (attention.kv_heads, 2, -1))[:, 0, :, 0] = KEY / constant
            query.unflatten(0, (attention.heads, 2, -1))[..., 0] = queries
        elif not attention.compresses_query:
            rotary_key = attention.kv_a_proj_with_mqa.get_parameter("weight")[attention.latent :].zero_()
            rotary_query = attention.q_proj.get_parameter("weight").unflatten(0, (attention.heads, -1))[:, attention.nope :].zero_()
            # Pairs are neighbours.
            rotary_key[::2, 0] = KEY / constant
            rotary_query.unflatten(1, (-1, 2))[..., 0] = queries.transpose(1, 2)
