"""The C++ decoder against the same model in plain torch, and the promise that a token's result depends on its own text alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import packed

from shoal.config import ModelConfig
from shoal.engine.native import NativeRunner
from shoal.engine.race import Races
from shoal.engine.runner import Batch, TorchRunner
from shoal.kernels.selection import BACKEND
from shoal.model import Transformer, init_weights
from shoal.model.counted import count_ngrams
from shoal.runtime import Machine

pytestmark = pytest.mark.skipif(BACKEND.cpu is None, reason=BACKEND.reason)

MLA: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "intermediate_size": 72,
    "num_attention_heads": 3,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
MODELS: dict[str, dict[str, Any]] = {
    "v3": {**MLA, "q_lora_rank": 32, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1},
    "v2": {**MLA, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "scoring_func": "softmax", "n_group": 4,
           "topk_group": 2, "norm_topk_prob": False, "n_shared_experts": 2},
    "lite": {**MLA, "model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
             "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 128, "mscale": 0.7, "mscale_all_dim": 0.7}},
    "shoal": {**MLA, "qk_norm": True, "logit_softcap": 15.0, "first_k_dense_replace": 0, "n_shared_experts": None,
              "num_nextn_predict_layers": 1},
    "mixture in the module": {**MLA, "num_hidden_layers": 2, "moe_layer_freq": 2, "num_nextn_predict_layers": 1},
    "mixtures by turns": {**MLA, "first_k_dense_replace": 0, "moe_layer_freq": 2, "n_shared_experts": 1, "num_nextn_predict_layers": 1},
    "dense": {**MLA, "n_routed_experts": None, "q_lora_rank": 100},
    "many heads": {**MLA, "num_attention_heads": 20},
    "llama": {**MLA, "model_type": "llama", "num_key_value_heads": 1, "num_attention_heads": 3},
    "qwen": {**MLA, "model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True, "head_dim": 20},
    "values": {**MLA, "value_embedding": True, "num_nextn_predict_layers": 1},
    "looking up": {**MLA, "model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20,
                   "value_embedding": True, "count_order": 3, "repeat_window": 50, "eos_token_id": 1},
}  # fmt: skip


def model_of(name: str) -> Transformer:
    torch.manual_seed(1)
    config = ModelConfig(**MODELS[name])
    counts = count_ngrams(REPETITIVE, np.array([0, 100, 400]), config.count_order, config.vocab_size) if config.count_order else None
    model = Transformer(replace(config, count_entries=0 if counts is None else len(counts.entries)))
    init_weights(model, 1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Norms and biases that would hide an error if they were 1 and 0, and tables that begin as nothing.
            if parameter.ndim == 1 or "value_embedding" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        if counts is not None and model.model.counted is not None:
            model.model.counted.fill(counts)
        for layer in model.moe_layers:
            if hasattr(layer.gate, "e_score_correction_bias"):
                layer.gate.e_score_correction_bias.normal_(std=0.2)
    return model.eval()


REPETITIVE = np.tile(np.random.default_rng(0).integers(2, 67, 40), 10)
"""A text to count."""


def runners(name: str, cache: Any = "fp32") -> tuple[NativeRunner, TorchRunner]:
    model = model_of(name)
    native = NativeRunner(model.config, packed(model), threads=2)
    torch_runner = TorchRunner(model, Machine(torch.device("cpu"), "fp32", 2, 1.0, ""))
    for runner in (native, torch_runner):
        runner.allocate(40, cache)
    return native, torch_runner


def tables(sequences: int) -> list[Any]:
    """Pages of each sequence, scattered."""
    return list(torch.randperm(40, generator=torch.Generator().manual_seed(3))[: sequences * 10].view(sequences, 10).int().numpy())


@pytest.mark.parametrize("name", MODELS)
def test_prefill_decode_and_drafts_equal_plain_torch(name: str) -> None:
    native, plain = runners(name)
    config, generator, places = native.config, torch.Generator().manual_seed(5), tables(3)
    lengths = [0, 0, 0]
    for news in ([5, 1, 140], [1, 1, 1], [150, 2, 3], [1, 1, 1]):
        ids = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in news]
        ids = [REPETITIVE[:n].tolist() if n > 100 else new for n, new in zip(news, ids, strict=True)]
        batch = Batch.lay_out(ids, lengths, places)
        lengths = [seen + n for seen, n in zip(lengths, news, strict=True)]
        mine, expected = native.forward(batch), plain.forward(batch)
        torch.testing.assert_close(mine.hidden, expected.hidden, rtol=1e-3, atol=1e-3)
        rows = range(sum(news))
        logits = native.logits(*mine.predictions(rows))
        torch.testing.assert_close(logits, plain.logits(*expected.predictions(rows)), rtol=1e-3, atol=2e-3)
        if expected.experts is None:
            assert mine.experts is None
        else:
            assert mine.experts is not None
            assert (mine.experts.sort(-1).values == expected.experts.sort(-1).values).float().mean() > 0.999
        if config.num_nextn_predict_layers:
            next_ids = torch.randint(config.vocab_size, (sum(news),), generator=generator)
            ahead = Batch.lay_out(ids, [seen - n for seen, n in zip(lengths, news, strict=True)], places, ahead=3)
            races = Races([0.0, 0.8, 2.0], [[11, 12, 13, 14], [15], [16, 17]])
            guessed, wanted = (runner.guess(ahead, expected.hidden, next_ids, races) for runner in (native, plain))
            torch.testing.assert_close(guessed.logits, wanted.logits, rtol=1e-3, atol=2e-3)
            assert guessed.tokens == wanted.tokens
            assert [len(tokens) for tokens in guessed.tokens] == [4, 1, 2]


@pytest.mark.parametrize("cache", ["bf16", "fp8"])
@pytest.mark.parametrize("name", ["v3", "qwen"])
def test_small_caches_are_read_as_plain_torch_reads_them(name: str, cache: str) -> None:
    native, plain = runners(name, cache)
    batch = Batch.lay_out([torch.arange(60).tolist()], [0], tables(1))
    got, wanted = native.forward(batch), plain.forward(batch)
    error = (got.hidden - wanted.hidden).square()
    if got.experts is not None and wanted.experts is not None:
        # Rounding may decide between experts of almost equal scores: such tokens are few, and become others.
        same = (got.experts.sort(-1).values == wanted.experts.sort(-1).values).all(-1).all(0)
        assert same.float().mean() > (0.9 if cache == "bf16" else 0.5)
        error = error[same]
    assert error.mean().sqrt() < (0.02 if cache == "bf16" else 0.1)


@pytest.mark.parametrize("cache", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", ["v3", "lite", "many heads", "qwen", "looking up"])
@settings(max_examples=6)
@given(data=st.data())
def test_results_do_not_depend_on_chunks_or_neighbours(name: str, cache: str, data: st.DataObject) -> None:
    native, _ = runners(name, cache)
    length = data.draw(st.integers(1, 300), label="length")
    ids = torch.randint(native.config.vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    ids[length // 2 :] = ids[: length - length // 2]
    place, other, third = tables(3)
    whole = native.forward(Batch.lay_out([ids], [0], [place]))
    alone = native.logits(*whole.predictions(range(length)))
    native.allocate(40, cache)  # type: ignore[arg-type]
    done, rows = 0, []
    while done < length:
        new = ids[done : done + data.draw(st.integers(1, length - done), label="chunk")]
        neighbours = data.draw(st.integers(0, 2), label="neighbours")
        batch = Batch.lay_out([[7] * 9, new, [1]][1 - (neighbours > 0) : 2 + (neighbours > 1)],
                              [0, done, 0][1 - (neighbours > 0) : 2 + (neighbours > 1)],
                              [other, place, third][1 - (neighbours > 0) : 2 + (neighbours > 1)])  # fmt: skip
        begin = 9 if neighbours else 0
        forward = native.forward(batch)
        everyone = native.logits(*forward.predictions(range(len(forward.hidden))))
        rows.append(everyone[begin : begin + len(new)])
        done += len(new)
    assert torch.cat(rows).equal(alone)


def test_a_broken_neighbour_does_not_spread() -> None:
    """Pages that once held NaN are used again; positions behind the end of a text are never read."""
    native, _ = runners("v3", "bf16")
    batch = Batch.lay_out([[1, 2, 3]], [0], tables(1))
    good = native.forward(batch).hidden
    native._cache.fill_(float("nan"))
    assert native.forward(batch).hidden.equal(good)


def test_steps_that_reach_outside_the_cache_are_refused() -> None:
    native, _ = runners("v3")
    good = Batch.lay_out([[1, 2, 3]], [0], tables(1))
    for bad in (
        {"tables": good.tables + 40},
        {"ids": good.ids + 67},
        {"positions": good.positions + 1000},
        {"positions": torch.tensor([0, 2, 3])},
        {"starts": torch.tensor([0, 2])},
        {"tables": good.tables.long()},
    ):
        with pytest.raises((ValueError, IndexError, TypeError)):
            native.forward(Batch(**{**good.__dict__, **bad}))


def test_moving_the_weights_changes_nothing() -> None:
    native, _ = runners("v3")
    batch = Batch.lay_out([[1, 2, 3]], [0], tables(1))
    before = native.forward(batch).hidden
    native.settle()
    assert native.forward(batch).hidden.equal(before)
    assert native.logits(before).isfinite().all()
