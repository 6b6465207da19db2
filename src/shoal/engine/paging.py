"""What to expect of a mapped model that is larger than memory: its experts come from disk as they are needed."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from ..config import ModelConfig
from ..kernels.packed import PackedMatrix
from .weights import Weights

MEASURED_BYTES = 64 << 20


def outlook(weights: Weights, available: int, disk_rate: float) -> str | None:
    """One line on the speed of weights that are mapped from disk; None where they fit into `available` bytes.

    `disk_rate` in bytes per second. What every token needs stays in memory as far as there is room; of the experts, that share stays
    which has room beside it, and the chosen ones are taken to be spread evenly.
    """
    if weights.nbytes <= available:
        return None
    always, experts = touched_bytes(weights)
    stored = sum(part.nbytes for name, part in weights.parts.items() if ".mlp.experts." in name)
    kept = min(1.0, max(0, available - always) / stored) if stored else 0.0
    read = max(0, always - available) + experts * (1 - kept)
    speed = f"at most {disk_rate / read:.2g} tokens/s" if read else "no reading from disk once it is warm"
    gigabytes = [f"{size / 1e9:.2f} GB" for size in (weights.nbytes, available, always + experts, read)]
    return (
        f"the model has {gigabytes[0]}, of memory {gigabytes[1]} are free: {kept:.0%} of the experts stay in memory; a token touches "
        f"{gigabytes[2]} and reads {gigabytes[3]} of it from disk ({disk_rate / 1e9:.2f} GB/s measured): {speed}"
    )


def touched_bytes(weights: Weights) -> tuple[int, int]:
    """Bytes that one token reads of what all tokens need (no MTP, no embedding table), and of the experts chosen for it."""
    always = experts = 0
    for name, part in weights.parts.items():
        if not isinstance(part, PackedMatrix) or _is_mtp(name, weights.config):
            continue
        if ".mlp.experts." in name:
            experts += part.nbytes * weights.config.num_experts_per_tok // part.leading[0]
        else:
            always += part.nbytes
    return always, experts


def disk_rate(folder: Path) -> float:
    """Bytes per second at which weights come from disk: a piece of the largest file of `folder`, read past the cache."""
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    length = min(MEASURED_BYTES, size)
    start = (size - length) // 2
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        os.lseek(descriptor, start, os.SEEK_SET)
        left = length
        while left and (piece := os.read(descriptor, min(left, 1 << 22))):
            left -= len(piece)
        return (length - left) / (time.perf_counter() - began)
    finally:
        os.close(descriptor)


def _is_mtp(name: str, config: ModelConfig) -> bool:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= config.num_hidden_layers
