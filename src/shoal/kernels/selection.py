"""Which kernels run on this machine, decided once at import."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from ..config import UserError


@dataclass(frozen=True)
class Backend:
    """The C++ kernels, or None for the reference, and one line that says which and why."""

    cpu: Any | None
    reason: str
    isa: str = ""
    module: Any = None
    """Of the C++ kernels."""


def choose(wanted: str) -> Backend:
    """The fastest kernels that run here, or those that `wanted` names: an instruction set, or `reference`.

    Raises:
        UserError: these kernels do not exist or do not run on this processor.
    """
    if wanted == "reference":
        return Backend(None, "reference kernels: SHOAL_KERNELS=reference is set")
    if importlib.util.find_spec(f"{__package__}._cpu") is None:
        if wanted:
            raise UserError(f"SHOAL_KERNELS={wanted}, but shoal was installed without a C++ compiler: unset it or install again")
        return Backend(None, "reference kernels: shoal was installed without a C++ compiler")
    _cpu: Any = importlib.import_module(f"{__package__}._cpu")
    supported = _cpu.supported()
    if wanted and wanted not in supported:
        raise UserError(f"SHOAL_KERNELS={wanted} does not run on this machine: use one of {', '.join([*supported, 'reference'])}")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return Backend(None, f"reference kernels: torch {torch.__version__} is too old to share tensors with the C++ ones")
    isa = wanted or supported[0]
    titles = {"avx512vnni": "AVX-512 VNNI and BF16", "avx512": "AVX-512", "avx2": "AVX2", "portable": "no special instructions"}
    return Backend(_cpu.Cpu(isa), f"cpu kernels: {titles[isa]} (C++)", isa, _cpu)


BACKEND = choose(os.environ.get("SHOAL_KERNELS", ""))
"""What SHOAL_KERNELS wants, decided once."""


def multiplies_fp8(device: torch.device) -> bool:
    """Whether products in FP8 run on a device; elsewhere they are simulated."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)
