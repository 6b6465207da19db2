"""The packed layout: what goes in comes out, and each number lies where the kernels look for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels.packed import pack_floats, pack_integers, unpack, unpack_integers


@settings(max_examples=40)
@given(
    leading=st.sampled_from([(), (3,), (2, 2)]),
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64]),
    format=st.sampled_from(["int4", "int8"]),
)
def test_packed_integers_come_back(leading: tuple[int, ...], rows: int, groups: int, group: int, format: str) -> None:
    quants = torch.randint(0, 16 if format == "int4" else 256, (*leading, rows, groups * group), dtype=torch.uint8)
    scales = torch.rand(*leading, rows, groups).half()
    matrix = pack_integers(format, quants, scales, group=group, columns=groups * group - 5)  # type: ignore[arg-type]
    q, s = unpack_integers(matrix)
    assert q.equal(quants)
    assert s.equal(scales)
    low = scales.float() * (-8 if format == "int4" else -128)
    expected = quants.float() * scales.float().repeat_interleave(group, -1) + low.repeat_interleave(group, -1)
    assert unpack(matrix).equal(expected[..., : groups * group - 5])


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_packed_floats_come_back(format: str) -> None:
    weight = torch.randn(2, 21, 7).bfloat16().float()
    matrix = pack_floats(weight, format)  # type: ignore[arg-type]
    assert matrix.data.shape == (2, 2, 7, 16)
    assert unpack(matrix).equal(weight)


def test_every_number_lies_where_the_layout_says() -> None:
    quants = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
    int4 = pack_integers("int4", quants, torch.ones(32, 2), group=32).data
    int8 = pack_integers("int8", quants, torch.ones(32, 2), group=32).data
    for row, column in [(0, 0), (5, 3), (15, 63), (16, 4), (31, 33)]:
        tile, r = divmod(row, 16)
        byte = int(int4[tile, column // 8, 4 * r + column % 4])
        assert (byte >> 4 if column % 8 >= 4 else byte & 15) == quants[row, column]
        assert int8[tile, column // 4, 4 * r + column % 4] == quants[row, column]
