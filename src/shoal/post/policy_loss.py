"""The policy-gradient loss of GRPO and its variants, as a function of log-probabilities.

GRPO: DeepSeekMath (2402.03300). No division by the group's deviation or the reply's length: Dr. GRPO (2503.20783). Clip-higher and
masking of replies that were cut off: DAPO (2503.14476). The KL estimate whose gradient is unbiased, and the mask on
negative samples that the policy has left behind: DeepSeek-V3.2 (2512.02556, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import PolicyOptions


def are_equal(rewards: Tensor) -> Tensor:
    """Groups that teach nothing, as all of their replies are worth the same: `[groups, G]` -> `[groups]` bool."""
    return rewards.amax(1) == rewards.amin(1)


def advantages(rewards: Tensor, divide_by_std: bool) -> Tensor:
    """Reward above the mean of its group, `[groups, G]` -> the same in fp32; also in units of the group's deviation if asked for.

    In fp64, as the difference between nearly equal rewards may be all that there is; what is left of equal ones is rounding.
    """
    rewards = rewards.double()
    centred = rewards - rewards.mean(1, keepdim=True)
    if divide_by_std:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-6)
    return centred.masked_fill(are_equal(rewards).unsqueeze(1), 0.0).float()


@dataclass
class PolicyLoss:
    """Sums over the tokens of one row; scalars."""

    total: Tensor
    """What is differentiated."""
    kl: Tensor
    """Estimate of KL(policy | reference); 0 without a reference."""
    clipped: Tensor
    """Tokens whose gradient the clip takes away."""
    masked: Tensor
    """Tokens of replies that the off-policy mask takes away."""


def policy_loss(
    logprobs: Tensor, sampled: Tensor, advantage: Tensor, sequence: Tensor, options: PolicyOptions, reference: Tensor | None = None
) -> PolicyLoss:
    """Loss of M tokens.

    Args:
        logprobs: `[M]`, of the policy, with gradient.
        sampled: `[M]`, of the engine that drew the tokens.
        advantage: `[M]`, of the reply that a token belongs to.
        sequence: `[M]` int64, the number of that reply, from 0 on.
        reference: `[M]`, of the model that `options.kl` holds the policy to.
    """
    ratio = (logprobs - sampled).exp()
    clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    keep = torch.ones_like(gain)
    if options.off_policy_limit:
        drift = _mean_by_sequence((sampled - logprobs).detach(), sequence)
        keep = 1 - ((drift > options.off_policy_limit) & (advantage < 0)).float()
    total = -(gain * keep).sum()
    kl = torch.zeros((), device=logprobs.device)
    if reference is not None:
        away = reference - logprobs
        # exp(x) - x - 1 estimates the divergence; weighted by the ratio, its gradient is unbiased for the present policy.
        per_token = ratio * (away.exp() - away - 1)
        kl = per_token.detach().sum()
        total = total + options.kl * per_token.sum()
    with torch.no_grad():
        outside = (ratio * advantage > clipped * advantage).sum()
    return PolicyLoss(total, kl, outside, (1 - keep).sum())


def _mean_by_sequence(values: Tensor, sequence: Tensor) -> Tensor:
    """The mean over its sequence, for every token."""
    count = int(sequence.max()) + 1
    sums = values.new_zeros(count).index_add_(0, sequence, values)
    sizes = torch.bincount(sequence, minlength=count).clamp(min=1)
    return (sums / sizes)[sequence]
