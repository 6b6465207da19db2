"""What a model looks up for its predictions beside its network: counted n-grams, and repetitions of the text.

Training, plain torch and the engine's decoder all look up here. Shapes: B sequences, T tokens, N predictions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import ModelConfig
from ..kernels import Candidates
from .counted import CountedNgrams
from .documents import Documents
from .repeats import Repeats

Corrections = tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]
"""Log-probabilities `[..., V]` with a factor for each row, and tokens with what is added to their logits; None for what a model lacks."""


class LookUps:
    """The look-ups of one model: nothing where it has none."""

    def __init__(self, counted: CountedNgrams | None, repeats: Repeats | None) -> None:
        self.counted, self.repeats = counted, repeats

    @classmethod
    def of(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> LookUps:
        """From the tensors of a model by the names that they have in files; to be used, not to be trained."""
        with torch.device("meta"):
            counted = CountedNgrams(config) if config.count_order else None
            repeats = Repeats(config) if config.repeat_window else None
        for prefix, module in (("model.counted", counted), ("model.repeats", repeats)):
            if module is not None:
                module.load_state_dict({name: tensors[f"{prefix}.{name}"] for name in module.state_dict()}, assign=True)
                module.requires_grad_(False)
        return cls(counted, repeats)

    @property
    def trusts(self) -> list[Tensor]:
        """Vectors `[D]` whose products with hidden states `corrections` wants."""
        return [part.trust for part in (self.counted, self.repeats) if part is not None]

    def keys(self, ids: Tensor, positions: Tensor, before: Tensor | None, documents: Documents | None = None) -> Tensor | None:
        """What to look up for every prediction, `[B, T, K]`: contexts of counted n-grams, then the two numbers of `Repeats.find`.

        `ids [B, T]` at `positions [B or 1, T]` behind `before [B, config.looks_back]`, or packed `documents`. None where nothing is looked
        up.
        """
        found = [] if self.counted is None else [self.counted.keys(ids, positions, before)]
        if self.repeats is not None:
            found.append(self.repeats.find(ids, before, None if documents is None else documents.positions == 0))
        return torch.cat(found, dim=-1) if found else None

    def corrections(self, keys: Tensor | None, products: Sequence[Tensor]) -> Corrections:
        """What `keys [..., K]` say; `products [...]`: the hidden states times each of `trusts`."""
        trusted = iter(products)
        prior = hint = None
        if self.counted is not None:
            assert keys is not None
            logarithms, lengths = self.counted(keys[..., : self.counted.order])
            prior = logarithms, self.counted.scale(next(trusted), lengths)
        if self.repeats is not None:
            assert keys is not None
            tokens, kinds = keys[..., -2:].unbind(-1)
            hint = tokens, self.repeats.bonus(next(trusted), kinds)
        return prior, hint

    def additions(self, candidates: Candidates, keys: Tensor | None, products: Sequence[Tensor]) -> Tensor | None:
        """What is added to the logits of candidates of `keys [N, K]`, `[N, C]`; `products [N]` as for `corrections`."""
        trusted = iter(products)
        added = []
        if self.counted is not None:
            assert candidates.probabilities is not None
            assert candidates.lengths is not None
            logarithms = candidates.probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
            added.append(logarithms * self.counted.scale(next(trusted), candidates.lengths).unsqueeze(-1))
        if self.repeats is not None:
            assert keys is not None
            tokens, kinds = keys[..., -2:].unbind(-1)
            added.append((candidates.tokens == tokens.unsqueeze(-1)) * self.repeats.bonus(next(trusted), kinds).unsqueeze(-1))
        return torch.stack(added).sum(0) if added else None

    def correct(self, logits: Tensor, keys: Tensor | None, products: Sequence[Tensor]) -> Tensor:
        """Logits `[..., V]` of the network with what was looked up."""
        prior, hint = self.corrections(keys, products)
        if prior is not None:
            logits = torch.addcmul(logits, prior[0], prior[1].unsqueeze(-1))
        if hint is not None:
            logits = logits.scatter_add(-1, hint[0].unsqueeze(-1), hint[1].unsqueeze(-1))
        return logits
