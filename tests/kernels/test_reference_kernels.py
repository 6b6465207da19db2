"""The reference kernels against the definitions, and their gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from shoal import kernels


def doubles(*shape: int) -> Tensor:
    """fp64, which only the reference takes."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_gradients_of_the_row_kernels() -> None:
    assert gradcheck(lambda x, w: kernels.rms_norm(x, w, 1e-6), (doubles(3, 5), doubles(5)))
    assert gradcheck(lambda x: kernels.rms_norm(x, None, 1e-6), (doubles(3, 5),))
    assert gradcheck(kernels.swiglu, (doubles(3, 5), doubles(3, 5)))
    cos, sin = torch.randn(2, 1, 4, 3, dtype=torch.float64)
    for interleaved in (True, False):
        assert gradcheck(lambda x, i=interleaved: kernels.apply_rope(x, cos, sin, i), (doubles(2, 4, 3, 6),))


def test_rms_norm_computes_in_fp32_and_keeps_the_dtype() -> None:
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # its square overflows fp16
    y = kernels.rms_norm(x, torch.full((4,), 2.0), 1e-6)
    assert y.dtype == torch.float16
    assert y.tolist() == [[2.0] * 4]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rope_is_a_rotation_of_complex_pairs(interleaved: bool, dtype: torch.dtype) -> None:
    x, angle = torch.randn(2, 5, 3, 8, dtype=dtype), torch.randn(2, 5, 4, dtype=dtype)
    y = kernels.apply_rope(x, angle.cos(), angle.sin(), interleaved)

    def pairs(t: Tensor) -> Tensor:
        t = t.unflatten(-1, (4, 2)) if interleaved else t.unflatten(-1, (2, 4)).transpose(-1, -2)
        return torch.view_as_complex(t.contiguous())

    turned = pairs(x) * torch.polar(torch.ones_like(angle), angle).unsqueeze(2)
    torch.testing.assert_close(pairs(y), turned)


@pytest.mark.parametrize(("kv_heads", "v_width"), [(4, 3), (2, 2), (1, 4)])
def test_attention_is_masked_softmax(kv_heads: int, v_width: int) -> None:
    q, k, v = doubles(2, 3, 4, 3), doubles(2, 3, kv_heads, 3), doubles(2, 3, kv_heads, v_width)
    many_k, many_v = (x.repeat_interleave(4 // kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, many_k) * 0.3
    scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), many_v)
    torch.testing.assert_close(kernels.causal_attention(q, k, v, 0.3), expected)
    assert gradcheck(lambda *qkv: kernels.causal_attention(*qkv, 0.3), (q, k, v))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [2, 100])
def test_linear_cross_entropy(softcap: float | None, chunk: int) -> None:
    hidden, weight, targets = doubles(5, 4), doubles(6, 4), torch.tensor([1, -100, 3, 0, 5])
    nats, _, counted = kernels.linear_cross_entropy(hidden, weight, targets, softcap, chunk=chunk)
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(nats, F.cross_entropy(logits, targets, reduction="sum"))
    assert counted == 4
    assert gradcheck(lambda h, w: kernels.linear_cross_entropy(h, w, targets, softcap, chunk=chunk).loss, (hidden, weight))


def test_linear_cross_entropy_scales_with_the_incoming_gradient_and_skips_frozen_inputs() -> None:
    hidden, weight, targets = torch.randn(7, 8, requires_grad=True), torch.randn(9, 8), torch.randint(0, 9, (7,))
    (kernels.linear_cross_entropy(hidden, weight, targets).loss * 0.5).backward()
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets, reduction="sum") * 0.5, hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
    with torch.no_grad():
        assert not kernels.linear_cross_entropy(hidden, weight, targets).loss.requires_grad


@pytest.mark.parametrize("wanted", ["hidden", "weight", "factors", "bonus"])
def test_linear_cross_entropy_gives_the_one_gradient_that_is_wanted(wanted: str) -> None:
    targets, hinted = torch.tensor([1, -100, 3, 0, 5]), torch.tensor([2, 0, 3, 1, 4])
    prior = torch.randn(5, 6, dtype=torch.float64).log_softmax(-1)
    inputs = {"hidden": doubles(5, 4), "weight": doubles(6, 4), "factors": doubles(5), "bonus": doubles(5)}
    frozen = {name: tensor.detach() for name, tensor in inputs.items()}

    def loss(x: Tensor) -> Tensor:
        given = frozen | {wanted: x}
        more = {"prior": (prior, given["factors"]), "hint": (hinted, given["bonus"])}
        return kernels.linear_cross_entropy(given["hidden"], given["weight"], targets, chunk=2, **more).loss

    assert gradcheck(loss, (inputs[wanted],))


def test_linear_cross_entropy_under_autocast() -> None:
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(100, 32, requires_grad=True)
    targets = torch.randint(0, 100, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        nats, *_ = kernels.linear_cross_entropy(hidden, weight, targets, softcap=15.0, chunk=48)
    nats.backward()
    assert nats.dtype == torch.float32
    plain_h, plain_w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    expected, *_ = kernels.linear_cross_entropy(plain_h, plain_w, targets, softcap=15.0)
    expected.backward()
    torch.testing.assert_close(nats, expected, rtol=1e-2, atol=0)
    for ours, theirs in ((hidden, plain_h), (weight, plain_w)):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad).norm() < 0.05 * theirs.grad.norm()


@given(st.integers(0, 12), st.integers(1, 4), st.integers(4, 9), st.integers(0, 2**31))
@settings(max_examples=40)
def test_sort_by_expert(tokens: int, per_token: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :per_token]
    order, inverse, offsets = kernels.sort_by_expert(indices, experts)
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == torch.bincount(indices.flatten(), minlength=experts).cumsum(0).tolist()
    pairs = [(int(e), n) for n, row in enumerate(indices) for e in row]
    assert order.tolist() == [n for _, n in sorted(pairs, key=lambda pair: pair[0])]  # sorted() is stable
    sorted_experts = torch.empty(len(pairs), dtype=torch.long)
    sorted_experts[inverse] = indices.flatten()
    assert sorted_experts.tolist() == sorted(e for e, _ in pairs)


def test_dispatch_and_combine_are_the_sum_over_experts() -> None:
    x, weights = doubles(5, 4), doubles(5, 2)
    order, inverse, _ = kernels.sort_by_expert(torch.tensor([[0, 2], [2, 4], [0, 4], [4, 0], [1, 2]]), 5)
    out = kernels.combine_tokens(kernels.permute_tokens(x, order, inverse), weights, inverse)
    torch.testing.assert_close(out, x * weights.sum(1, keepdim=True))
    assert gradcheck(lambda x: kernels.permute_tokens(x, order, inverse), (x,))
    assert gradcheck(lambda y, w: kernels.combine_tokens(y, w, inverse), (doubles(10, 4), weights))


SIZES = [[3, 0, 4, 1], [0, 0, 0, 5], [5, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("width", "out"), [(8, 12), (5, 3)])  # the first takes torch's grouped_mm, the second the reference
def test_grouped_linear_with_empty_groups(sizes: list[int], width: int, out: int) -> None:
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    x, weight = torch.randn(sum(sizes), width, requires_grad=True), torch.randn(4, out, width, requires_grad=True)
    y = kernels.grouped_linear(x, weight, offsets)
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    expected = torch.einsum("ri,roi->ro", x, weight[groups])
    torch.testing.assert_close(y, expected)
    grad = torch.randn(1, out).expand_as(y)  # not contiguous
    for ours, theirs in zip(torch.autograd.grad(y, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_grouped_linear_gradients_and_autocast() -> None:
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    assert gradcheck(lambda x, w: kernels.grouped_linear(x, w, offsets), (doubles(6, 4), doubles(3, 5, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.grouped_linear(torch.randn(6, 8), torch.randn(3, 16, 8), offsets).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5), (1, 4, 4), (1, 1, 3)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_newton_schulz_moves_the_singular_values_and_keeps_their_vectors(shape: tuple[int, int, int], steps: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(kernels.newton_schulz(x, steps), u @ torch.diag_embed(s) @ v)
