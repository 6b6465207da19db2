"""What a client asks for is what the engine is told."""

from __future__ import annotations

from shoal.config import SamplingOptions
from shoal.serve.options import sampling_of
from shoal.serve.protocol import SamplingBody

ASKED = {
    "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5,
    "frequency_penalty": -0.5, "seed": 7, "stop": ["one", "two"], "stop_token_ids": [3, 4], "logit_bias": {"5": -2.0, "6": 1.5},
    "min_tokens": 2, "ignore_eos": True, "prompt_logprobs": 3,
}  # fmt: skip


def test_every_field_reaches_the_engine() -> None:
    told = sampling_of(SamplingBody(**ASKED), 11, 4, 512)  # type: ignore[arg-type]
    assert told == SamplingOptions(
        max_tokens=11, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=-0.5, seed=7, stop=("one", "two"), stop_token_ids=(3, 4), logit_bias={5: -2.0, 6: 1.5},
        min_tokens=2, ignore_eos=True, logprobs=4, prompt_logprobs=3,
    )  # fmt: skip
    assert all(value != getattr(SamplingOptions(), name) for name, value in vars(told).items()), "nothing is at its default"


def test_a_field_left_away_is_openai_s_default() -> None:
    assert sampling_of(SamplingBody(), None, None, 512) == SamplingOptions(max_tokens=2**31, temperature=1.0)
