"""Large pages and mapped files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.memory import LARGE_PAGE, MappedFiles, copy_bytes, large_pages


@pytest.mark.parametrize("size", [0, 1, 4096, LARGE_PAGE + 5])
def test_large_pages_are_zeros_that_can_be_written(size: int) -> None:
    memory = large_pages(size)
    assert memory.shape == (size,)
    assert not memory.any()
    copy_bytes(torch.full((size,), 7, dtype=torch.uint8), memory)
    assert (memory == 7).all()


def test_a_forgotten_part_of_a_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 256)
    mapped = torch.from_numpy(np.memmap(path, np.uint8, "c"))
    anonymous = torch.arange(1 << 16).to(torch.uint8)
    files = MappedFiles()
    for tensor in (mapped, anonymous):
        files.forget(tensor[5:])
        assert tensor[5:300].tolist() == [i % 256 for i in range(5, 300)]
