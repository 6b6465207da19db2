"""Adam for tables: what the dense optimizer does, at the price of the rows that are read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.train.table_adam import TableAdam


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=12), st.booleans())
def test_it_equals_torch_adam_without_momentum(steps: list[list[int]], sparse: bool) -> None:
    start = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = TableAdam([ours], lr=0.1, beta=0.95, eps=1e-10)
    peer = torch.optim.Adam([theirs], lr=0.1, betas=(0.0, 0.95), eps=1e-10)
    for number, rows in enumerate(steps):
        weights = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(number))
        for parameter, kind in ((ours, sparse), (theirs, False)):
            parameter.grad = None
            (torch.nn.functional.embedding(torch.tensor(rows), parameter, sparse=kind) * weights).sum().backward()
        optimizer.step()
        peer.step()
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_it_goes_on_from_its_state_to_the_bit() -> None:
    def run(parameter: torch.nn.Parameter, optimizer: TableAdam, steps: range) -> None:
        for number in steps:
            parameter.grad = None
            torch.nn.functional.embedding(torch.tensor([number % 3, 4]), parameter, sparse=True).square().sum().backward()
            optimizer.step()

    whole = torch.nn.Parameter(torch.ones(5, 2))
    run(whole, TableAdam([whole], 0.1, 0.95, 1e-10), range(8))
    half = torch.nn.Parameter(torch.ones(5, 2))
    first = TableAdam([half], 0.1, 0.95, 1e-10)
    run(half, first, range(4))
    second = TableAdam([half], 0.1, 0.95, 1e-10)
    second.load_state_dict(first.state_dict())
    run(half, second, range(4, 8))
    assert half.equal(whole)


def test_rows_that_are_not_read_do_not_move() -> None:
    table = torch.nn.Parameter(torch.ones(5, 2))
    optimizer = TableAdam([table], 0.1, 0.95, 1e-10)
    for _ in range(3):
        table.grad = None
        torch.nn.functional.embedding(torch.tensor([1, 1]), table, sparse=True).sum().backward()
        optimizer.step()
    moved = (table != 1).any(1)
    assert moved.tolist() == [False, True, False, False, False]
    assert table[1, 0].item() == pytest.approx(1 - 3 * 0.1, rel=1e-4)
