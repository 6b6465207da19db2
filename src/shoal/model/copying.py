"""Initial weights with which Multi-head Latent Attention copies: an induction head (Elhage et al., 2021; Olsson et al., 2209.11895).

Where the last two tokens stood before, what followed them there is likely now. Networks learn to look by circuits of two layers, late and
at once; here they begin with one, in weights as plain as any, and learn on from there:

- In the first layer heads 0 and 1 look at the token before and the one before that (`init.anchor`), and write a projection of what they
  see into channels of the stream that are kept free for it.
- In the second layer the key of head 0 is what these channels hold: the two tokens before. Its query is the same of the present token and
  the one before it. So it looks at what followed the same two tokens.
- What it sees there it writes into a third group of channels, and the output head begins with weights in them that name the token.

Only MLA has keys without rotation, which match at any distance. Shapes: V tokens of vocabulary, D model width, R latent width, N non-rotary
and W value channels of a head, K channels of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ModelConfig
from .attention import MLA
from .rope import softmax_scale
from .transformer import Transformer

MATCH = 12.0
"""Attention logit where both tokens are the same, before which other places have one of about 0, give or take a third of it."""
SECOND = 0.7
"""Weight of the token before in key and query, that of the token itself being 1."""
WRITTEN, NAMED = 3.0, 0.3
"""Size of what is written for the output head, and of the head's weights for it: together they raise its logit by about a nat."""


def begin_copying(model: Transformer, generator: torch.Generator) -> None:
    """Set the weights of the circuit in the first two layers, the embedding and the output head, which are anchored already."""
    config = model.config
    first, second = (block.self_attn for block in model.blocks[:2])
    assert isinstance(first, MLA)
    assert isinstance(second, MLA)
    group = group_width(config)
    before, earlier, seen = (slice(1 + i * group, 1 + (i + 1) * group) for i in range(3))
    kept_free = slice(before.start, seen.stop)
    embedding = model.model.embed_tokens.weight
    embedding[:, kept_free] = 0
    own = config.hidden_size - kept_free.stop  # channels that differ from token to token, with variance 1

    def without_constant(attention: MLA) -> tuple[Tensor, Tensor]:
        """Its projections to the latent `[R, D]` and from there `[H, N + W, R]`; a latent tells tokens apart and nothing else."""
        down = attention.kv_a_proj_with_mqa.get_parameter("weight")[: attention.latent]
        down[:, 0] = 0
        return down, attention.kv_b_proj.get_parameter("weight").unflatten(0, (attention.heads, -1))

    # The first layer: one projection of the last two tokens, into a group each.
    down, up = without_constant(first)
    value = up[0, first.nope :]
    up[1, first.nope :] = value
    output = first.o_proj.get_parameter("weight").unflatten(1, (first.heads, -1))  # [D, H, W]
    channels = torch.arange(group)
    output[before.start + channels, 0, channels] = 1
    output[earlier.start + channels, 1, channels] = 1
    # What it says of a token, as a map of the embedding: behind its norms, the latent's included, `own` channels are left of D.
    said = (value[:group] @ down) * (config.hidden_size / own) ** 0.5
    said[:, : kept_free.stop] = 0

    # The second: sizes are those behind the layer's norm, in units of the stream's root mean square.
    turn = SECOND * torch.linalg.qr(torch.empty(group, group).normal_(generator=generator))[0]  # so that the order of two tokens matters
    down, up = without_constant(second)
    down[:, kept_free] = 0
    down[:group] = 0
    down[channels, before.start + channels] = 1
    down[:group, earlier] = turn
    variance = 1 + SECOND**2
    latent = ((group * variance + (second.latent - group) * own / config.hidden_size) / second.latent) ** 0.5
    stream = (embedding[:, 0].square().mean() + own + 2 * group).div(config.hidden_size) ** 0.5
    up[0] = up[0] * (torch.arange(second.latent) >= group)  # values tell of the token itself
    up[0, : second.nope] = 0
    up[0, channels, channels] = 1
    query = second.q_proj.get_parameter("weight").unflatten(0, (second.heads, -1))[0].zero_()  # [N + P, D]
    query[:group] = said
    query[:group, before] = turn
    query *= MATCH / softmax_scale(config) / (group * variance) * latent * stream

    # What it sees, for the output head.
    output = second.o_proj.get_parameter("weight").unflatten(1, (second.heads, -1))
    output[seen.start + channels, 0, channels] = WRITTEN
    names = embedding @ (up[0, second.nope :][:group] @ down).T / latent  # [V, K]
    model.lm_head.weight[:, seen] = NAMED * (names - names.mean(0))


def group_width(config: ModelConfig) -> int:
    """Channels of one group: as many as head, latent and stream have room for."""
    return min(config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank // 2, config.hidden_size // 4)
