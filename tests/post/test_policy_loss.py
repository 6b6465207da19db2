"""The policy loss: what it rewards, what it leaves alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import PolicyOptions
from shoal.post.policy_loss import advantages, are_equal, policy_loss

OPTIONS = PolicyOptions()


def gradient(
    new: list[float], old: list[float], advantage: list[float], options: PolicyOptions = OPTIONS, **more: torch.Tensor
) -> list[float]:
    logprobs = torch.tensor(new, requires_grad=True)
    sequence = torch.arange(len(new))
    policy_loss(logprobs, torch.tensor(old), torch.tensor(advantage), sequence, options, **more).total.backward()
    assert logprobs.grad is not None
    return logprobs.grad.tolist()


def test_on_policy_the_gradient_is_minus_the_advantage() -> None:
    assert gradient([-1.0, -2.0], [-1.0, -2.0], [0.5, -0.25]) == [-0.5, 0.25]


def test_what_moved_far_in_the_wanted_direction_is_left_alone() -> None:
    up, down = 1.0, -1.0
    # ratios 1.2 (inside, because the upper bound is higher), 1.35 (outside), 0.7 (outside downwards)
    logs = torch.tensor([1.2, 1.35, 0.7]).log().tolist()
    assert gradient(logs, [0.0] * 3, [up] * 3)[1] == 0
    assert gradient(logs, [0.0] * 3, [up] * 3)[0] < 0
    assert gradient(logs, [0.0] * 3, [down] * 3)[2] == 0
    # In the unwanted direction nothing holds the gradient back.
    assert gradient(logs, [0.0] * 3, [down] * 3)[1] > 0


def test_advantages_are_centred_in_their_group_and_not_divided_unless_asked() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert advantages(rewards, False).tolist() == [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]]
    assert advantages(rewards, True)[0, 0] > 1.4


@given(st.floats(-3, 3), st.integers(2, 16), st.booleans())
def test_equal_rewards_teach_nothing(reward: float, size: int, divide: bool) -> None:
    rewards = torch.tensor([[reward] * size, [*[reward] * (size - 1), reward + 1]])
    assert are_equal(rewards).tolist() == [True, False]
    worth = advantages(rewards, divide)
    assert worth[0].count_nonzero() == 0
    assert worth[1].count_nonzero() == size


def test_off_policy_mask_takes_whole_bad_replies_that_the_policy_left_behind() -> None:
    logprobs = torch.tensor([-3.0, -3.0, -3.0, -3.0], requires_grad=True)
    sampled = torch.tensor([-1.0, -3.0, -1.0, -3.0])
    sequence = torch.tensor([0, 0, 1, 1])
    advantage = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    loss = policy_loss(logprobs, sampled, advantage, sequence, PolicyOptions(clip_low=10, off_policy_limit=0.5))
    loss.total.backward()
    assert loss.masked == 2
    assert logprobs.grad is not None
    assert logprobs.grad[:2].tolist() == [0, 0]
    assert (logprobs.grad[2:] < 0).all()


def test_off_policy_the_kl_estimate_is_the_divergence_and_so_is_its_gradient() -> None:
    """Over all tokens of a small vocabulary, each drawn as often as the others."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    sampled, reference = torch.full_like(logits, 1 / 5).log().detach(), torch.randn(5, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    loss = policy_loss(logprobs, sampled, torch.zeros(5), torch.arange(5), PolicyOptions(kl=2.0), reference)
    assert torch.allclose(loss.kl / 5, divergence)
    [one], [other] = torch.autograd.grad(loss.total / 5, [logits], retain_graph=True), torch.autograd.grad(divergence, [logits])
    assert torch.allclose(one, 2 * other)
