"""The C++ Newton-Schulz iteration, of every instruction set that this machine runs, against the reference in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal import kernels
from shoal.kernels import cpu, reference

native = pytest.importorskip("shoal.kernels._cpu", reason="shoal was installed without a C++ compiler")


@pytest.fixture(autouse=True, params=native.supported())
def _instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu, "_cpu", native.Cpu(request.param))
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for these sizes the reference spends its time on waking threads
    yield
    torch.set_num_threads(threads)


def compare(x: Tensor, steps: int, atol: float = 2e-5) -> None:
    before = x.clone()
    y = cpu.newton_schulz(x, steps)
    torch.testing.assert_close(y, reference.newton_schulz(x.double(), steps).float(), rtol=0, atol=atol)
    assert torch.equal(y, cpu.newton_schulz(x, steps))
    assert torch.equal(x, before)


@given(
    st.integers(1, 4), st.integers(1, 70), st.integers(1, 70), st.integers(0, 6), st.sampled_from([1e-12, 1e-3, 1e6]), st.integers(0, 2**31)
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes(batch: int, rows: int, columns: int, steps: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    compare(scale * torch.randn(batch, rows, columns), steps)


@pytest.mark.parametrize("shape", [(2, 1, 300), (3, 17, 33), (2, 64, 200), (2, 300, 40), (5, 192, 192), (2, 192, 384), (1, 130, 150)])
def test_shapes_of_real_models_and_ragged_ones(shape: tuple[int, int, int]) -> None:
    compare(torch.randn(shape), steps=5)
    compare(torch.randn(shape[0], shape[2], shape[1]).mT, steps=5)  # not contiguous


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (40, 100), (100, 40)])
def test_matrices_without_full_rank(rows: int, columns: int) -> None:
    compare(torch.randn(2, rows, 3) @ torch.randn(2, 3, columns), steps=5, atol=1e-4)
    spectrum = torch.ones(40).index_fill(0, torch.arange(1, 40), 1e-3)  # one direction hides all others
    u, _, v = torch.linalg.svd(torch.randn(2, rows, columns), full_matrices=False)
    compare(u @ torch.diag(spectrum) @ v, steps=5, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(64, 200), (300, 96), (128, 256)])
def test_singular_values_of_a_gaussian_matrix_end_near_one(rows: int, columns: int) -> None:
    values = torch.linalg.svdvals(cpu.newton_schulz(torch.randn(2, rows, columns), 5))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_many_steps_do_not_diverge_where_singular_values_are_zero() -> None:
    thin = torch.randn(2, 48, 3) @ torch.randn(2, 3, 120)
    assert torch.linalg.svdvals(cpu.newton_schulz(thin, 16)).max() < 1.3


def test_zeros_stay_zeros_and_nan_stays_in_its_matrix() -> None:
    x = torch.randn(4, 20, 50)
    alone = cpu.newton_schulz(x[3:], 5)
    x[1] = 0
    x[2, 3, 4] = torch.nan
    y = cpu.newton_schulz(x, 5)
    assert not y[1].any()
    assert y[2].isnan().all()
    assert y[0].isfinite().all()
    assert torch.equal(y[3:], alone)


def test_the_number_of_threads_changes_no_bit() -> None:
    x = torch.randn(5, 40, 60)
    results = []
    for threads in (1, 2, 7):  # more threads than matrices
        results.append(torch.empty_like(x))
        cpu._cpu.newton_schulz(x, *reference.QUINTIC, 5, results[-1], threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_who_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "newton_schulz", lambda x, steps: "kernel")
    monkeypatch.setattr(reference, "newton_schulz", lambda x, steps: "torch")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert kernels.newton_schulz(torch.ones(2, 1024, 1025), 5) == "kernel"
    assert kernels.newton_schulz(torch.ones(2, 1025, 1025), 5) == "torch"
    assert kernels.newton_schulz(torch.ones(1, 8, 8), 5) == "torch"
    assert kernels.newton_schulz(torch.ones(2, 8, 8).bfloat16(), 5) == "torch"


def test_misuse_raises_instead_of_writing_outside_a_tensor() -> None:
    x = torch.randn(2, 4, 8)
    for y in (x[:1], x[0], x.mT):
        with pytest.raises(ValueError, match=r"shapes|contiguous"):
            cpu._cpu.newton_schulz(x, *reference.QUINTIC, 5, y, 1)
