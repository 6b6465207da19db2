"""One transformer for training and serving: DeepSeek-V2, DeepSeek-V3 or a dense Llama, by configuration.

Parameters bear the names of the official checkpoints, except that routed experts are stacked (see `moe.Experts`).
Shapes: B sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import ModelConfig
from .attention import GQA, MLA, Context, LayerCache
from .block import Block
from .counted import CountedNgrams
from .documents import Documents
from .layers import RMSNorm
from .look_ups import LookUps
from .moe import Dispatcher, LocalDispatcher, MoE, RoutingStats
from .mtp import MTPModule
from .ngrams import Ngrams
from .repeats import Repeats
from .rope import rotary_tables, softmax_scale, yarn_beyond


class Backbone(nn.Module):
    """Embedding, layers (the MTP modules after the last of them, as in official files) and final norm."""

    def __init__(self, config: ModelConfig, dispatcher: Dispatcher) -> None:
        super().__init__()
        # Not `nn.Embedding(...)`: drawing normal numbers on the device `meta` makes torch import its compiler, which takes two seconds.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1), freeze=False)
        self.ngrams = Ngrams(config) if config.ngram_order else None
        self.counted = CountedNgrams(config) if config.count_order else None
        self.repeats = Repeats(config) if config.repeat_window else None
        layers, depths = config.num_hidden_layers, config.num_nextn_predict_layers
        blocks = [Block(config, i, dispatcher) for i in range(layers)]
        self.layers = nn.ModuleList(blocks + [MTPModule(config, layers + k, dispatcher) for k in range(depths)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


@dataclass
class Output:
    """Result of a forward pass."""

    hidden: Tensor
    """After the final norm, `[B, T, D]`; `Transformer.logits` turns it into predictions of the next token."""
    mtp_hidden: list[Tensor]
    """Per MTP depth k = 1, 2, ...: `[B, T, D]`, predicting the token k + 1 ahead; empty unless asked for."""
    routing: list[RoutingStats]
    """One for every MoE layer, MTP layers last."""
    keys: Tensor | None = None
    """What to look up for every prediction, `[B, T, K]`: contexts of counted n-grams, then the two numbers of `Repeats.find`; None without
    either."""


class Transformer(nn.Module):
    """The model. `dispatcher` comes from outside and moves tokens to experts."""

    def __init__(self, config: ModelConfig, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.model = Backbone(config, dispatcher or LocalDispatcher())
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def blocks(self) -> list[Block]:
        """The main model's decoder layers, without the MTP modules."""
        return [layer for layer in self.model.layers if not isinstance(layer, MTPModule)]  # type: ignore[misc]

    @property
    def mtp_modules(self) -> list[MTPModule]:
        return [layer for layer in self.model.layers if isinstance(layer, MTPModule)]

    @property
    def look_ups(self) -> LookUps:
        return LookUps(self.model.counted, self.model.repeats)

    @property
    def moe_layers(self) -> list[MoE]:
        """Every mixture of experts, in the order of `Output.routing`."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def extend_context(self, trained: int) -> None:
        """See `max_position_embeddings` tokens, by YaRN, after training on rows of `trained`; the model has to get used to it."""
        self.config = replace(self.config, rope_scaling=yarn_beyond(self.config, trained))
        for module in self.modules():
            if isinstance(module, (MLA, GQA)):
                module.scale = softmax_scale(self.config)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        mtp_ids: Sequence[Tensor] = (),
        documents: Documents | None = None,
        chosen: Sequence[Tensor] | None = None,
        before: Tensor | None = None,
    ) -> Output:
        """`ids [B, T]` -> `Output`.

        `positions [B, T]` defaults to 0 ... T - 1. With `caches` (one per layer) tokens attend to everything cached;
        without, to each other. `mtp_ids[k - 1] [B, T]` holds for every position i the token i + k: one entry for every
        MTP depth to run, in order. `documents` (B = 1) packs several texts into one row: each has positions from 0 on
        and sees itself alone. `chosen` holds `[B, T, K]` for every MoE layer of the main model: the experts to use in
        place of the routers' choice. `before [B, config.looks_back]` are the tokens in front of `ids`, -1 where there is none.
        """
        if documents is not None:
            positions = documents.positions
        elif positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        x = self.model.embed_tokens(ids)
        if self.model.ngrams is not None:
            x = x + self.model.ngrams(ids, positions, before)
        keys = self.look_ups.keys(ids, positions, before, documents)
        context = Context(positions, *rotary_tables(self.config, positions), documents, ids, x)
        replayed = iter(chosen or ())
        routing: list[RoutingStats] = []
        for i, block in enumerate(self.blocks):
            x, stats = block(x, context, caches[i] if caches else None, next(replayed, None) if self.config.is_moe_layer(i) else None)
            if stats is not None:
                routing.append(stats)
        hidden, mtp_hidden, more = self.finish(x, context, mtp_ids, caches)
        return Output(hidden, mtp_hidden, routing + more, keys)

    def finish(
        self, x: Tensor, context: Context, mtp_ids: Sequence[Tensor], caches: Sequence[LayerCache] | None = None
    ) -> tuple[Tensor, list[Tensor], list[RoutingStats]]:
        """What follows the last decoder layer, whose output is `x [B, T, D]`: the three fields of `Output` that it makes."""
        hidden = self.model.norm(x)
        mtp_hidden: list[Tensor] = []
        routing: list[RoutingStats] = []
        previous = hidden
        for depth, shifted in enumerate(mtp_ids, 1):
            cache = caches[self.config.num_hidden_layers + depth - 1] if caches else None
            previous, normed, stats = self._run_mtp(depth, previous, shifted, context, cache)
            mtp_hidden.append(normed)
            if stats is not None:
                routing.append(stats)
        return hidden, mtp_hidden, routing

    def ahead(self, depth: int, previous: Tensor, shifted: Tensor, ids: Tensor, positions: Tensor, caches: Sequence[LayerCache]) -> Tensor:
        """MTP module `depth` (1, 2, ...) by itself, for drafting; `[B, T, D]` after its norm.

        `previous [B, T, D]` is what depth - 1 gave for `ids [B, T]` at `positions`, `shifted [B, T]` the tokens `depth` ahead, `caches`
        those of all layers.
        """
        context = Context(positions, *rotary_tables(self.config, positions), ids=ids)
        return self._run_mtp(depth, previous, shifted, context, caches[self.config.num_hidden_layers + depth - 1])[1]

    def _run_mtp(
        self, depth: int, previous: Tensor, shifted: Tensor, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, RoutingStats | None]:
        """Representation of `depth`, the same after the module's norm, and what its router did."""
        module = self.mtp_modules[depth - 1]
        x, stats = module(module.join(previous, self.model.embed_tokens(shifted)), context, cache)
        return x, module.shared_head["norm"](x), stats

    def logits(self, hidden: Tensor, keys: Tensor | None = None) -> Tensor:
        """`[..., D]` -> `[..., V]` in fp32, soft-capped where configured; `keys [..., K]` as in `Output`."""
        logits = self.lm_head(hidden).float()
        look_ups = self.look_ups
        logits = look_ups.correct(logits, keys, _products(hidden, look_ups.trusts))
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def cross_entropy(
        self, hidden: Tensor, targets: Tensor, keys: Tensor | None = None, soft: tuple[Tensor, float] | None = None
    ) -> kernels.CrossEntropy:
        """Nats of `targets [...]` (-100 does not count) under `logits`, of which only some rows exist at a time.

        `keys` as for `logits`; `soft`: a teacher's probabilities `[..., V]` and their share in what is learnt.
        """
        hidden, keys = hidden.flatten(0, -2), None if keys is None else keys.flatten(0, -2)
        if soft is not None:
            soft = soft[0].flatten(0, -2), soft[1]
        look_ups = self.look_ups
        prior, hint = look_ups.corrections(keys, _products(hidden, look_ups.trusts))
        return kernels.linear_cross_entropy(hidden, self.lm_head.weight, targets.flatten(), self.config.logit_softcap, prior, hint, soft)

    def sampled_cross_entropy(self, hidden: Tensor, candidates: kernels.Candidates, keys: Tensor | None = None) -> kernels.CrossEntropy:
        """About the same, of the targets that `candidates` of `hidden [..., D]` begin with, from the candidates' logits alone."""
        hidden, keys = hidden.flatten(0, -2), None if keys is None else keys.flatten(0, -2)
        look_ups = self.look_ups
        more = look_ups.additions(candidates, keys, _products(hidden, look_ups.trusts))
        return kernels.sampled_cross_entropy(hidden, self.lm_head.weight, candidates, more)


def _products(hidden: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
    """Of `hidden [..., D]` with each of some vectors `[D]`, `[...]` fp32."""
    return [hidden.float() @ vector.float() for vector in vectors]
