from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.numerics.fp8 import FP8_MAX, TILE, decode
from shoal.parallel.wire import Format, pack, row_bytes, unpack


@given(st.integers(0, 5), st.integers(1, 300), st.integers(0, 1000), st.sampled_from(["exact", "bf16", "fp8"]))
def test_rows_arrive_as_the_format_rounds_them(rows: int, width: int, seed: int, format: Format) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * 10 ** (4 * torch.rand(rows, 1, generator=generator) - 2)
    packed = pack(x, format)
    assert packed.shape == (rows, row_bytes(width, format, x.dtype))
    got = unpack(packed, format, width, x.dtype)
    if format == "exact":
        assert got.equal(x)
    elif format == "bf16":
        assert got.equal(x.bfloat16().float())
    else:
        tiles = torch.nn.functional.pad(x, (0, -width % TILE)).unflatten(1, (-1, TILE)).abs().amax(-1)
        step = (tiles / FP8_MAX * 2**-9).repeat_interleave(TILE, 1)[:, :width]  # of the smallest numbers
        assert ((got - x).abs() <= x.abs() * 2**-4 * 1.001 + step).all()


def test_every_fp8_number_is_read_as_torch_reads_it() -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    expected = numbers.view(torch.float8_e4m3fn).float()
    finite = expected.isfinite()
    assert finite.sum() == 254
    assert decode(numbers.unsqueeze(0))[0][finite].equal(expected[finite])


@pytest.mark.parametrize("format", ["exact", "bf16", "fp8"])
def test_zeros_stay_zeros(format: Format) -> None:
    assert unpack(pack(torch.zeros(2, 200), format), format, 200, torch.float32).equal(torch.zeros(2, 200))
