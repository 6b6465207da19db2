from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import UserError
from shoal.numerics.fp8 import dequantize_blocks


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_every_number_is_multiplied_by_the_scale_of_its_block(rows: int, columns: int, high: int, wide: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // high), -(-columns // wide), generator=generator) + 0.5
    out = dequantize_blocks(weight, scale, block=(high, wide))
    plain = weight.float()
    for i in range(rows):
        for j in range(columns):
            assert out[i, j] == plain[i, j] * scale[i // high, j // wide]


def test_ragged_edges_of_official_blocks() -> None:
    weight = torch.ones(130, 257).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 7.0).view(2, 3)
    out = dequantize_blocks(weight, scale, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert out[[0, 127, 128, 129]][:, [0, 127, 128, 256]].tolist() == [[1, 1, 2, 3], [1, 1, 2, 3], [4, 4, 5, 6], [4, 4, 5, 6]]


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (3, 2)])
def test_scales_of_another_matrix_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="weight_block_size"):
        dequantize_blocks(torch.ones(130, 257).to(torch.float8_e4m3fn), torch.ones(shape))
