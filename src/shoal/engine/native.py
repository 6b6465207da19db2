"""The runner on CPUs: one call into C++ for a whole step (csrc/decoder.cpp)."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..config import CacheFormat, ModelConfig
from ..formats.parts import EMBEDDING, HEAD
from ..kernels.packed import PackedMatrix, pack_floats
from ..kernels.serving import decoder, pin_threads
from ..memory import MappedFiles, copy_bytes, large_pages
from ..model import LATENT_NORM_EPS, LookUps, rotary_tables, softmax_scale
from ..runtime import available_memory
from .batch import PAGE, Batch
from .past import Past
from .race import Races
from .runner import DTYPES, Forward, Guesses

_ATTENTION = {
    "q_a_proj": "q_a",
    "q_a_layernorm.weight": "q_a_norm",
    "q_b_proj": "q",
    "q_proj": "q",
    "kv_a_proj_with_mqa": "kv_a",
    "kv_a_layernorm.weight": "kv_a_norm",
    "k_up": "k_up",
    "v_up": "v_up",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "q_proj.bias": "q_bias",
    "k_proj.bias": "k_bias",
    "v_proj.bias": "v_bias",
    "value_embedding.weight": "value_embedding",
}
_LAYER = {
    **{f"self_attn.{name}": short for name, short in _ATTENTION.items()},
    "input_layernorm.weight": "input_norm",
    "post_attention_layernorm.weight": "post_norm",
    "mlp.gate.weight": "router",
    "mlp.gate.e_score_correction_bias": "router_bias",
    **{f"mlp.experts.{part}_proj": f"expert_{part}" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj": part for part in ("gate", "up", "down")},
    **{f"mlp.{part}_proj": part for part in ("gate", "up", "down")},
    "eh_proj": "join",
    "enorm.weight": "embedding_norm",
    "hnorm.weight": "hidden_norm",
    "shared_head.norm.weight": "head_norm",
}
"""Name of a weight in its layer -> its name in the decoder."""


class NativeRunner:
    """Runs packed weights with the C++ kernels (see `Runner`)."""

    device = torch.device("cpu")

    def __init__(self, config: ModelConfig, weights: Mapping[str, PackedMatrix | Tensor], threads: int) -> None:
        """`weights`: see `Weights`; they stay where they are (a mapped file, for instance).

        Raises:
            ValueError: a weight is missing or has another shape than `config` says.
        """
        self.config, self.threads = config, threads
        self.natural_cache: CacheFormat = "bf16"
        count = config.num_hidden_layers + config.num_nextn_predict_layers
        layers: list[dict[str, Any]] = [{} for _ in range(count)]
        for name, weight in weights.items():
            if name.startswith("model.layers."):
                number, _, part = name.removeprefix("model.layers.").partition(".")
                # The router is fp32 in every file, and small: it is put in tiles here.
                tiled = isinstance(weight, Tensor) and part == "mlp.gate.weight"
                layers[int(number)][_LAYER[part]] = pack_floats(weight, "fp32") if tiled else weight  # type: ignore[arg-type]
        top = {"embedding": weights[EMBEDDING], "norm": weights["model.norm.weight"], "head": weights[HEAD]}
        if all(w.format == "fp32" for w in weights.values() if isinstance(w, PackedMatrix)):
            self.natural_cache = "fp32"
        mapped = MappedFiles()
        for name, weight in weights.items():
            if name.endswith("mlp.gate.weight") and isinstance(weight, Tensor):
                mapped.forget(weight)
        embedding = weights[EMBEDDING]
        assert isinstance(embedding, Tensor)  # its rows are looked up: it is never packed
        self._mapped, self._embedding = mapped, embedding
        self._decoder: Any = decoder(_shape(config), top, layers, config.num_hidden_layers)
        self._lock = threading.Lock()
        """Held while the decoder runs or a matrix moves."""
        self._cache = torch.empty(0)
        self._tables = (torch.empty(0), torch.empty(0))
        self._mixtures = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
        self._look_ups = LookUps.of(config, weights)  # type: ignore[arg-type]
        self._past: Past | None = None

        self._moving: list[tuple[int, str, Any]] = [(-1, "head", top["head"])]
        for i, layer in enumerate(layers):
            self._moving += [(i, name, weight) for name, weight in layer.items() if isinstance(weight, PackedMatrix) and name != "router"]

    def settle(self) -> bool:
        """Move the matrices, one by one, into large pages of memory; the runner can be used meanwhile.

        A mapped file serves its first token at once, but its small pages are read more slowly. Nothing moves where that does not fit;
        returns whether it did.
        """
        arrays = [array for _, _, matrix in self._moving for array in (matrix.data, matrix.scales) if array is not None]
        total = sum(round_up(array.nbytes) for array in arrays)
        if total > available_memory(self.device):
            return False
        room, used, mapped = large_pages(total), 0, MappedFiles()
        while self._moving:
            layer, name, matrix = self._moving.pop()
            moved = {}
            for part in ("data", "scales"):
                array = getattr(matrix, part)
                if array is not None:
                    place = room[used : used + array.nbytes]
                    copy_bytes(array, place)
                    moved[part] = place.view(array.dtype).view(array.shape)
                    used += round_up(array.nbytes)
            with self._lock:
                self._decoder.replace(layer, name, replace(matrix, **moved))
            for part in moved:
                mapped.forget(getattr(matrix, part))
        return True

    def pin(self) -> None:
        """Bind the decoder's threads, the calling one among them, to one core each, if they are as many as this process may use.

        Otherwise the system may put two of them on one core, as it does where a thread wakes another, and leave the other core to
        whoever else runs. For a process that does nothing else.
        """
        cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
        if len(cores) == self.threads > 1:
            pin_threads(cores)

    def allocate(self, pages: int, cache: CacheFormat) -> None:
        """See `Runner`. Memory is taken only as pages are written."""
        layers = self.config.num_hidden_layers + self.config.num_nextn_predict_layers
        shape, dtype = (layers, pages, PAGE, self.config.cache_values_per_token), DTYPES[cache]
        self._cache = large_pages(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        self._past = Past(pages, self.config.looks_back, self.device) if self.config.looks_back else None

    def forward(self, batch: Batch) -> Forward:
        """See `Runner`."""
        tokens = len(batch.ids)
        hidden = torch.empty(tokens, self.config.hidden_size)
        experts = torch.empty(self._mixtures, tokens, self.config.num_experts_per_tok, dtype=torch.int32) if self._mixtures else None
        place = (batch.positions, batch.starts, batch.tables, *self._rotary(batch), self._cache)
        with self._lock:
            self._decoder.forward(batch.ids, *place, hidden, experts, self.threads)
        if tokens > PAGE:  # a prompt's rows of the embedding: the system keeps the file's pages, this process need not
            self._mapped.forget(self._embedding)
        return Forward(hidden, experts, None if self._past is None else self._keys(batch, self._past.before(batch)))

    def logits(self, hidden: Tensor, keys: Tensor | None = None) -> Tensor:
        """See `Runner`."""
        out = torch.empty(len(hidden), self.config.vocab_size)
        with self._lock:
            self._decoder.logits(hidden.contiguous(), out, self.threads)
        if self._past is None:  # nothing is looked up
            return out
        # Not as matrix products: their sums depend on the number of rows.
        return self._look_ups.correct(out, keys, [(hidden * trust).sum(-1) for trust in self._look_ups.trusts])

    def guess(self, batch: Batch, hidden: Tensor, next_ids: Tensor, races: Races) -> Guesses:
        """See `Runner`; all passes in one call."""
        counts = [len(starts) for starts in races.starts]
        logits = torch.empty(sum(map(bool, counts)), self.config.vocab_size)
        place = (batch.positions, batch.starts, batch.tables, *self._rotary(batch), self._cache)
        numbers = races.starts[0] if len(counts) == 1 else list(chain.from_iterable(races.starts))
        with self._lock:
            flat = self._decoder.guess(
                batch.ids, next_ids, *place, hidden.contiguous(), logits, counts, races.temperatures, numbers, self.threads
            )
        tokens = []
        for count in counts:
            tokens.append([token for token in flat[:count] if token >= 0])
            del flat[:count]
        return Guesses(tokens, logits)

    def copy_page(self, source: int, target: int) -> None:
        """See `Runner`."""
        self._cache[:, target] = self._cache[:, source]
        if self._past is not None:
            self._past.copy_page(source, target)

    def _keys(self, batch: Batch, before: Tensor) -> Tensor:
        """What to look up for every token of `batch`, `[N, K]`; sequences with as many new tokens are searched together."""
        counts = batch.starts.diff()
        keys: list[Tensor] = []
        rows: list[Tensor] = []
        for count in counts.unique().tolist():
            sequences = (counts == count).nonzero()[:, 0]
            row = batch.starts[sequences, None] + torch.arange(count)
            found = self._look_ups.keys(batch.ids[row], batch.positions[row], before[sequences])
            assert found is not None
            keys.append(found.flatten(0, 1))
            rows.append(row.flatten())
        return keys[0] if len(keys) == 1 else torch.cat(keys)[torch.cat(rows).argsort()]

    def _rotary(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions up to the batch's last; the tables grow as texts do."""
        needed = batch.tables.shape[1] * PAGE
        if len(self._tables[0]) < needed:
            length = min(max(2 * needed, 1024), max(needed, self.config.max_position_embeddings))
            self._tables = rotary_tables(self.config, torch.arange(length))
        return self._tables


def round_up(nbytes: int) -> int:
    """To whole cache lines."""
    return -(-nbytes // 64) * 64


def _shape(config: ModelConfig) -> dict[str, Any]:
    """The numbers the decoder wants."""
    mla = config.uses_mla
    return {
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "heads": config.num_attention_heads,
        "latent": int(mla),
        "nope": config.qk_nope_head_dim if mla else 0,
        "rope": config.qk_rope_head_dim if mla else 0,
        "value": config.v_head_dim if mla else 0,
        "rank": config.kv_lora_rank if mla else 0,
        "q_rank": (config.q_lora_rank or 0) if mla else 0,
        "kv_heads": config.kv_heads,
        "head": config.qk_head_dim,
        "softmax_scale": softmax_scale(config),
        "norm_eps": config.rms_norm_eps,
        "latent_norm_eps": LATENT_NORM_EPS,
        "qk_norm_eps": config.rms_norm_eps if config.qk_norm else 0.0,
        "softcap": config.logit_softcap or 0.0,
        "experts": config.n_routed_experts or 0,
        "per_token": config.num_experts_per_tok if config.n_routed_experts else 0,
        "groups": 1 if config.topk_method == "greedy" else config.n_group,
        "open_groups": 1 if config.topk_method == "greedy" else config.topk_group,
        "sigmoid": int(config.scoring_func == "sigmoid"),
        "biased": int(config.topk_method == "noaux_tc"),
        "normalise": int(config.norm_topk_prob),
        "routed_scale": config.routed_scaling_factor,
    }
