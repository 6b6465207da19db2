"""The model that a run started with, to hold the policy to."""

from __future__ import annotations

from types import TracebackType

import torch

from ..model import Transformer
from .adapters import AdaptedExperts, AdaptedLinear


class Reference:
    """Inside this context the model is the one that it was when this object was made.

    With adapters that is the model without them, and costs no memory; otherwise the weights are copied once and change
    places with the present ones.
    """

    def __init__(self, model: Transformer) -> None:
        self._adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear | AdaptedExperts)]
        self._scales = [module.adapter_scale for module in self._adapted]
        self._weights = [] if self._adapted else [(p, p.detach().clone()) for p in model.parameters()]

    def __enter__(self) -> None:
        self._change_places()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._change_places()

    def _change_places(self) -> None:
        for module, scale in zip(self._adapted, self._scales, strict=True):
            module.adapter_scale = 0.0 if module.adapter_scale else scale
        with torch.no_grad():
            for parameter, other in self._weights:
                present = parameter.clone()
                parameter.copy_(other)
                other.copy_(present)
