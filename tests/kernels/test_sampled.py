"""Sampled softmax against torch's cross-entropy, and candidates against sorted probabilities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal import kernels
from shoal.kernels import Candidates, CountTables, cpu, reference

native = pytest.importorskip("shoal.kernels._cpu", reason="shoal was installed without a C++ compiler")

varied = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True, params=native.supported())
def _instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_cpu", native.Cpu(request.param))


def some_candidates(rows: int, count: int, vocab: int) -> Candidates:
    """Of which some do not count; the target always does."""
    log_weights = torch.randn(rows, count)
    log_weights[torch.rand(rows, count) < 0.2] = -math.inf
    log_weights[:, 0] = 0
    shares = torch.where(log_weights.isinf(), 0.0, torch.rand(rows, count))
    return Candidates(torch.randint(vocab, (rows, count)), log_weights, shares)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 70), st.booleans(), seeds)
@varied
def test_both_kernels_agree(rows: int, count: int, width: int, corrected: bool, seed: int) -> None:
    torch.manual_seed(seed)
    hidden, weight = 3 * torch.randn(rows, width + 3)[:, :width], torch.randn(37, width)
    tokens, log_weights, shares, *_ = some_candidates(rows, count, 37)
    more = torch.randn(rows, count) if corrected else None
    ours = cpu.sampled_cross_entropy(hidden, weight, tokens, log_weights, shares, more)
    theirs = reference.sampled_cross_entropy(hidden, weight, tokens, log_weights, shares, more)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    sums = [torch.zeros(37, width) for _ in range(2)]
    for kernel, y in zip((cpu, reference), sums, strict=True):
        kernel.add_to_rows(ours[2], tokens, hidden, y)
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-4)


def everything(targets: Tensor, vocab: int) -> Candidates:
    """All tokens, the target first."""
    others = torch.arange(vocab).expand(len(targets), -1)
    others = others[others != targets[:, None]].view(len(targets), vocab - 1)
    tokens = torch.cat([targets[:, None], others], dim=1)
    shares = F.pad(torch.ones(len(targets), 1), (0, vocab - 1))
    return Candidates(tokens, torch.zeros(tokens.shape), shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_the_whole_vocabulary_it_is_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vocab, hidden, weight = 19, torch.randn(700, 24, dtype=dtype), torch.randn(19, 24, dtype=dtype)
    more, targets = torch.randn(700, vocab, dtype=dtype), torch.randint(vocab, (700,))
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, more)]
    candidates = everything(targets, vocab)
    ours = kernels.sampled_cross_entropy(hidden, weight, candidates, more)
    logits = (hidden @ weight.T).gather(1, candidates.tokens) + more
    theirs = F.cross_entropy(logits, torch.zeros(700, dtype=torch.int64), reduction="sum")
    torch.testing.assert_close(ours.loss, theirs)
    torch.testing.assert_close(ours.nats, theirs.detach())
    assert ours.counted == 700
    for one, other in zip(torch.autograd.grad(ours.loss / 700, inputs), torch.autograd.grad(theirs / 700, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_any_weights_and_shares() -> None:
    torch.manual_seed(0)
    candidates = some_candidates(6, 5, 9)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (9, 4), (6, 5))]
    candidates = candidates._replace(log_weights=candidates.log_weights.double(), shares=candidates.shares.double())
    torch.autograd.gradcheck(lambda h, w, m: kernels.sampled_cross_entropy(h, w, candidates, m).loss, inputs)


def test_autocast_on_a_cpu_changes_nothing() -> None:
    torch.manual_seed(0)
    hidden, weight, candidates = torch.randn(30, 8), torch.randn(9, 8), some_candidates(30, 5, 9)
    plain = kernels.sampled_cross_entropy(hidden, weight, candidates)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.sampled_cross_entropy(hidden, weight, candidates).loss.equal(plain.loss)
        torch.testing.assert_close(kernels.sampled_cross_entropy(hidden.bfloat16(), weight, candidates).loss, plain.loss, rtol=0.01, atol=0)


def test_the_number_of_threads_changes_nothing() -> None:
    torch.manual_seed(0)
    hidden, weight, candidates = torch.randn(900, 48), torch.randn(500, 48, requires_grad=True), some_candidates(900, 70, 500)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = kernels.sampled_cross_entropy(hidden, weight, candidates).loss
        results.append((loss, *torch.autograd.grad(loss, weight)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(one.equal(two) for one, two in zip(results[0], other, strict=True))


def test_misuse_raises_instead_of_reading_outside_a_tensor() -> None:
    hidden, weight, candidates = torch.randn(4, 8), torch.randn(9, 8), some_candidates(4, 5, 9)
    with pytest.raises(IndexError):
        kernels.sampled_cross_entropy(hidden, weight, candidates._replace(tokens=torch.full((4, 5), 9)))
    with pytest.raises(IndexError):
        cpu.sampled_cross_entropy(hidden, weight[:0], torch.zeros(4, 5, dtype=torch.int64), candidates.log_weights, candidates.shares, None)
    with pytest.raises(ValueError, match="shapes"):
        kernels.sampled_cross_entropy(hidden[:3], weight, candidates)
    with pytest.raises(ValueError, match="shapes"):
        kernels.sampled_cross_entropy(hidden, weight, candidates, torch.randn(4, 4))
    with pytest.raises(IndexError):
        cpu.add_to_rows(torch.randn(4, 5), torch.full((4, 5), -1), hidden, torch.zeros(9, 8))
    with pytest.raises(ValueError, match="shapes"):
        kernels.counted_candidates(tables(9), torch.full((4, 2), -1), torch.zeros(4, 1, dtype=torch.int64), 9, torch.zeros(4, 0).long())


def tables(vocab: int) -> CountTables:
    """Pairs and triples that some numbers follow."""
    bits, generator = 8, torch.Generator().manual_seed(vocab)
    keys = torch.randint(40, (300,), generator=generator)
    follows = torch.where(keys < 20, keys % 3, torch.randint(vocab, (300,), generator=generator))
    entries = torch.unique(keys << bits | follows)
    counts = torch.randint(1, 9, (len(entries),), generator=generator).short()
    base = torch.rand(vocab, generator=generator) + 0.01
    return CountTables(entries, counts, bits, torch.tensor([[0, 0.4, 0.7, 0.9]] * 2), base / base.sum())


@given(st.integers(3, 60), st.integers(0, 2), st.integers(0, 20), seeds)
@varied
def test_candidates_are_the_likeliest(vocab: int, certain: int, likeliest: int, seed: int) -> None:
    torch.manual_seed(seed)
    likeliest = min(likeliest, vocab - certain)
    counted, keys = tables(vocab), torch.randint(-1, 45, (12, 1)).expand(-1, 2)  # a longer context has what a shorter one has
    first, drawn = torch.randint(vocab, (12, certain)), torch.randint(vocab, (12, 7))
    tokens, probabilities, lengths = kernels.counted_candidates(counted, keys, first, likeliest, drawn)
    expected, found = kernels.counted_prior(counted, keys)
    assert lengths.equal(found)
    assert tokens[:, :certain].equal(first)
    assert tokens[:, certain + likeliest :].equal(drawn)
    for row, told, whole in zip(tokens.tolist(), probabilities.tolist(), expected.tolist(), strict=True):
        sure = row[:certain]
        best = sorted((p for token, p in enumerate(whole) if token not in sure), reverse=True)[:likeliest]
        assert told[certain : certain + likeliest] == pytest.approx(best, rel=1e-5), "by falling probability"
        taken: set[int] = set()
        for place, (token, p) in enumerate(zip(row, told, strict=True)):
            assert p == pytest.approx(0 if token in taken else whole[token], rel=1e-5)
            if place < certain + likeliest:
                taken.add(token)
    plain = reference.candidates_of(expected.clone(), found, first, likeliest, drawn)
    torch.testing.assert_close(probabilities[:, : certain + likeliest], plain[1][:, : certain + likeliest])
