"""Which tokens the head is asked about in training, where it is not asked about all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..config import SampledSoftmaxConfig
from ..data import TokenShards
from ..kernels import Candidates
from ..model.counted import CountedNgrams
from .counting import Teacher

SLOTS = 32
"""In the table that tokens are drawn from, for every token; each has one at least."""


class Sampler:
    """Candidates of every position: its target, what a repetition hints at, what counts hold likeliest, and tokens drawn at random.

    The drawn ones stand for all that are left: each weighs 1 / (how often it is drawn in the mean). They are drawn by the square root of
    their frequency, for every position anew: errors of neighbours that share them would not cancel.
    """

    def __init__(
        self,
        config: SampledSoftmaxConfig,
        text: TokenShards,
        vocabulary: int,
        seed: int,
        counted: CountedNgrams | None,
        teacher: Teacher | None,
        hinted: bool,
    ) -> None:
        """`counted` knows what is likely: a teacher's counts, or those of the model; `hinted`: the model knows repetitions."""
        self._config, self._seed, self._counted, self._teacher, self._hinted = config, seed, counted, teacher, hinted
        frequency = np.sqrt(np.bincount(text.tokens, minlength=vocabulary) + 1.0)
        slots = np.maximum(np.rint(frequency / frequency.sum() * SLOTS * vocabulary), 1).astype(np.int64)
        self._table = torch.from_numpy(np.repeat(np.arange(vocabulary), slots))
        self._log_weights = torch.from_numpy(-np.log(config.drawn * slots / slots.sum())).float()
        self._random = torch.Generator()

    def begin(self, step: int) -> None:
        """What is drawn depends on the seed and the step alone: a run that is resumed draws the same."""
        self._random.manual_seed((self._seed * 1_000_003 + step) % 2**63)

    def __call__(self, ids: Tensor, targets: Tensor, keys: Tensor | None) -> Candidates:
        """For targets `[B, T]` of `ids [B, T]`, N = B * T; `keys [B, T, K]` as the model gives them."""
        target_N1 = targets.reshape(-1, 1)
        device, N = target_N1.device, len(target_N1)
        draws = torch.randint(len(self._table), (N, self._config.drawn), generator=self._random)
        drawn_NM = self._table[draws].to(device)
        first, trust = target_N1, None
        if self._hinted:
            assert keys is not None
            first = torch.cat([target_N1, keys[..., -2].reshape(-1, 1)], dim=1)
        elif self._teacher is not None and self._teacher.repetitions is not None:
            hints, trust = (found.flatten() for found in self._teacher.repetitions(ids))
            first = torch.cat([target_N1, hints.unsqueeze(1)], dim=1)
        probabilities = lengths = None
        if self._counted is None:
            certain = first.shape[1]
            tokens = torch.cat([first, drawn_NM], dim=1)
            others = (drawn_NM.unsqueeze(2) != first.unsqueeze(1)).all(2)
            counts = torch.cat([torch.ones_like(target_N1, dtype=torch.bool), first[:, 1:] != target_N1, others], dim=1)
        else:
            certain = first.shape[1] + self._config.likeliest
            contexts = keys if self._teacher is None else self._teacher.keys(ids)
            assert contexts is not None
            contexts = contexts[..., : self._counted.order].flatten(0, -2)
            tokens, probabilities, lengths = kernels.counted_candidates(
                self._counted.filled, contexts, first, self._config.likeliest, drawn_NM
            )
            counts = probabilities > 0
        log_weights = torch.zeros(tokens.shape, device=device)
        log_weights[:, certain:] = self._log_weights.to(device)[drawn_NM]
        log_weights.masked_fill_(~counts, -torch.inf)
        if self._teacher is None:
            shares = torch.zeros_like(log_weights)
            shares[:, 0] = 1
        else:
            assert probabilities is not None
            shares = self._teacher.share * probabilities * log_weights.exp()
            if trust is not None:
                shares *= (1 - trust).unsqueeze(1)
                hinted = torch.where(first[:, 0] == first[:, 1], 0, 1)  # a hint that is the target counts in its place
                shares.scatter_add_(1, hinted.unsqueeze(1), (self._teacher.share * trust).unsqueeze(1))
            shares[:, 0] += 1 - self._teacher.share
        return Candidates(tokens, log_weights, shares, probabilities, lengths)
