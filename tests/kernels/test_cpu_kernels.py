"""The C++ kernels, of every instruction set that this machine runs, against the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal import kernels
from shoal.config import UserError
from shoal.kernels import cpu, reference, selection

native = pytest.importorskip("shoal.kernels._cpu", reason="shoal was installed without a C++ compiler")

varied = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.integers(1, 70)
scales = st.sampled_from([1e-12, 1e-3, 1.0, 30.0, 1e4])
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True, params=native.supported())
def _instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_cpu", native.Cpu(request.param))


def strided(*shape: int, scale: float = 1.0) -> Tensor:
    """A view into a wider tensor, as the parts of a fused projection are; contiguous in the last dimension only."""
    return (scale * torch.randn(*shape[:-1], shape[-1] + 5))[..., 2:-3].requires_grad_()


def compare(name: str, *args: object, rtol: float = 1e-4, atol: float = 1e-5, grad_atol: float | None = None) -> None:
    """Results and gradients of both kernels, and that the second run of the fast one gives the same bits."""
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    assert cpu.runs(*inputs)
    run: Callable[..., Tensor] = getattr(cpu, name)
    ours, theirs = run(*args), getattr(reference, name)(*args)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    grad = torch.randn(*theirs.shape[:-1], 2 * theirs.shape[-1])[..., ::2]  # no contiguous dimension
    expected = torch.autograd.grad(theirs, inputs, grad)
    grads = torch.autograd.grad(ours, inputs, grad)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=(grad_atol or atol) * max(1.0, b.abs().max().item()))
    again = run(*args)
    for a, b in zip((ours, *grads), (again, *torch.autograd.grad(again, inputs, grad)), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(run(*args), ours)


@given(sizes, sizes, scales, st.booleans(), seeds)
@varied
def test_rms_norm(rows: int, width: int, scale: float, weighted: bool, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(width, requires_grad=True) if weighted else None
    compare("rms_norm", strided(2, rows, width, scale=scale), weight, 1e-6, rtol=1e-3)


@given(sizes, sizes, scales, seeds)
@varied
def test_swiglu(rows: int, width: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    compare("swiglu", strided(rows, width, scale=scale), strided(rows, width))


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 4), st.integers(1, 20), st.booleans(), st.booleans(), seeds)
@varied
def test_rope(batch: int, time: int, heads: int, half: int, interleaved: bool, shared: bool, seed: int) -> None:
    torch.manual_seed(seed)
    cos, sin = torch.randn(2, 1 if shared else batch, time, half)
    compare("apply_rope", strided(batch, time, heads, 2 * half), cos, sin, interleaved)


@given(st.integers(1, 2), st.integers(1, 220), st.sampled_from([(1, 1), (3, 3), (4, 2)]), sizes, sizes, scales, seeds)
@varied
def test_attention(batch: int, time: int, heads: tuple[int, int], qk: int, v: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    h, kv = heads
    q, k, values = strided(batch, time, h, qk), strided(batch, time, kv, qk), strided(batch, time, kv, v)
    # Large scores are rounded coarsely, by a part of `scale`, and the softmax amplifies that: two nearly equal scores share differently. In
    # gradients the difference counts `scale` times once more.
    tolerance = 1e-4 * max(1.0, scale / 10)
    compare("causal_attention", q, k, values, scale * qk**-0.5, rtol=tolerance, atol=tolerance, grad_atol=max(tolerance, 1e-7 * scale**2))


@pytest.mark.parametrize("shape", [(1, 512, 2, 96, 64), (1, 400, 1, 192, 128), (2, 97, 2, 48, 32)])
def test_attention_at_the_widths_of_real_models(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch, time, heads, qk, v = shape
    compare("causal_attention", strided(batch, time, heads, qk), strided(batch, time, heads, qk), strided(batch, time, heads, v), qk**-0.5)


def test_attention_does_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 300, 2, 32)
    results = []
    for threads in (1, 2, 7):  # more threads than heads: several share one
        y, log_sum = torch.empty_like(v), torch.empty(1, 2, 300)
        cpu._cpu.attention(q, k, v, 0.2, y, log_sum, threads)
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@given(st.integers(1, 20), st.integers(1, 5), sizes, seeds)
@varied
def test_permute_and_combine(tokens: int, per_token: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    order, inverse, _ = kernels.sort_by_expert(torch.rand(tokens, 6).argsort(1)[:, :per_token], 6)
    compare("permute_tokens", strided(tokens, width), order, inverse)
    compare("combine_tokens", strided(tokens * per_token, width), strided(tokens, per_token), inverse)


@given(st.integers(1, 20), st.integers(2, 200), scales, st.sampled_from([None, 1.0, 15.0]), st.booleans(), seeds)
@varied
def test_cross_entropy_rows(rows: int, vocab: int, scale: float, softcap: float | None, with_grad: bool, seed: int) -> None:
    torch.manual_seed(seed)
    logits, targets = scale * torch.randn(rows, vocab), torch.randint(0, vocab, (rows,))
    targets[torch.rand(rows) < 0.2] = reference.IGNORED
    ours, theirs = logits.clone(), logits.clone()
    nats = cpu.cross_entropy_rows(ours, targets, softcap, with_grad)
    torch.testing.assert_close(nats, reference.cross_entropy_rows(theirs, targets, softcap, with_grad), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 130), st.integers(1, 130), seeds)
@varied
def test_grouped_products(counts: list[int], depth: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    counts = [*counts, 3]
    x, grad = strided(sum(counts), depth).detach(), strided(sum(counts), width).detach()
    weight, ends = torch.randn(len(counts), width, depth), torch.tensor(counts).cumsum(0).int()
    y = cpu.grouped_product(x, weight, ends, transposed=True)
    back, outer = cpu.grouped_product(grad, weight, ends, transposed=False), cpu.grouped_outer(grad, x, ends)
    parts = list(zip(x.double().split(counts), grad.double().split(counts), weight.double(), strict=True))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.double(), torch.cat([a @ w.T for a, _, w in parts]), **close)
    torch.testing.assert_close(back.double(), torch.cat([g @ w for _, g, w in parts]), **close)
    torch.testing.assert_close(outer.double(), torch.stack([g.T @ a for a, g, _ in parts]), **close)
    # the same bits whatever stands beside a row, and on one thread
    last = torch.tensor([3], dtype=torch.int32)
    assert torch.equal(cpu.grouped_product(x[-3:], weight[-1:], last, transposed=True), y[-3:])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(cpu.grouped_product(x, weight, ends, transposed=True), y)
        assert torch.equal(cpu.grouped_outer(grad, x, ends), outer)
    finally:
        torch.set_num_threads(threads)


@given(sizes, sizes, st.integers(1, 300), st.booleans(), seeds)
@varied
def test_dense_products(rows: int, depth: int, width: int, transposed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, depth), torch.randn(width, depth).T if transposed else torch.randn(depth, width)
    results = [kernel.product(x, weight, torch.empty(rows, width)) for kernel in (cpu, reference)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    sums = [torch.ones(depth, width), torch.ones(depth, width)]
    for kernel, out in zip((cpu, reference), sums, strict=True):
        kernel.add_outer(x, results[0], out)
    torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-3)


def test_nan_and_infinity_reach_the_result() -> None:
    x = torch.randn(3, 40)
    x[1, 7] = torch.nan
    assert cpu.rms_norm(x, None, 1e-6).isnan().any(1).tolist() == [False, True, False]
    assert cpu.swiglu(x, x).isnan().sum() == 1
    assert cpu.cross_entropy_rows(x.clone(), torch.tensor([0, 1, 2]), None, True).isnan().tolist() == [False, True, False]
    q = torch.randn(1, 40, 1, 16)
    q[0, 9] = torch.nan
    assert cpu.causal_attention(q, q.nan_to_num(), q.nan_to_num(), 0.3).isnan().any(-1).nonzero()[:, 1].tolist() == [9]
    x[1, 7] = -torch.inf
    assert cpu.cross_entropy_rows(x.clone(), torch.tensor([0, 1, 2]), None, True).isfinite().all()


def test_misuse_raises_instead_of_reading_outside_a_tensor() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(IndexError):
        cpu.cross_entropy_rows(x, torch.tensor([0, 1, 2, 8]), None, False)
    with pytest.raises(IndexError):
        cpu.combine_tokens(x, torch.ones(2, 2), torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="shapes"):
        cpu.swiglu(x, x[:3])
    with pytest.raises(ValueError, match="shapes"):
        cpu.rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(TypeError):
        cpu.rms_norm(x.double(), None, 1e-6)
    for ends in ([2, 1, 4], [1, 2, 3], [-1, 0, 4]):
        with pytest.raises(ValueError, match="shapes"):
            cpu.grouped_product(x, torch.randn(3, 5, 8), torch.tensor(ends, dtype=torch.int32), transposed=True)
    with pytest.raises(ValueError, match="shapes"):
        cpu.grouped_outer(x, x[:3], torch.tensor([4], dtype=torch.int32))
    with pytest.raises(IndexError):
        cpu.combine_tokens(x[:0], torch.ones(2, 2), torch.zeros(4, dtype=torch.int64))
    nobody = torch.empty(0, 4, 1, 8)
    with pytest.raises(ValueError, match="shapes"):
        cpu.causal_attention(nobody, nobody, nobody, 1.0)
    for threads in (0, -1):
        with pytest.raises(ValueError, match="at least one thread"):
            cpu._cpu.rms_norm_backward(x, None, 1e-6, x, torch.empty_like(x), None, threads)


def test_other_tensors_take_the_reference() -> None:
    x = torch.randn(2, 4)
    assert cpu.runs(x, None, torch.nn.Parameter(x))
    assert not cpu.runs(x.bfloat16())
    assert not cpu.runs(x.to("meta"))
    assert not cpu.runs(x[:0])


def test_the_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selection.choose("reference").cpu is None
    assert selection.choose(native.supported()[-1]).cpu is not None
    with pytest.raises(UserError, match="use one of"):
        selection.choose("mmx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert selection.choose("").reason == "reference kernels: shoal was installed without a C++ compiler"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kernels_share_torchs_threads() -> None:
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(libraries) <= 1
