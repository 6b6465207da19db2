"""From a client's fields to the engine's options."""

from __future__ import annotations

from typing import Any

from ..config import SamplingOptions
from .errors import bad
from .protocol import MOST_STOPS, SamplingBody

MOST_TOKENS = 2**31
MOST_BIAS = 100


def sampling_of(body: SamplingBody, max_tokens: int | None, logprobs: int | None, vocab_size: int) -> SamplingOptions:
    """How to sample; without `max_tokens`, up to the end of the context."""
    body.check_supported()
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stop) > MOST_STOPS:
        raise bad(f"stop holds {len(stop)} texts: {MOST_STOPS} are the most", "stop")
    options = SamplingOptions(
        max_tokens=MOST_TOKENS if max_tokens is None else max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        stop=tuple(text for text in stop if text),
        seed=None if body.seed is None else body.seed % 2**64,
        min_tokens=body.min_tokens or 0,
        ignore_eos=body.ignore_eos,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logit_bias=_bias(body.logit_bias or {}, vocab_size),
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )
    options.validate(least_tokens=0)
    return options


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _bias(bias: dict[str, Any], vocab_size: int) -> dict[int, float]:
    result = {}
    for token, value in bias.items():
        if not token.isascii() or not token.isdecimal() or len(token) > 9 or int(token) >= vocab_size:
            raise bad(f"logit_bias names {token[:20]!r}, which is no token of this model", "logit_bias")
        if not isinstance(value, int | float) or not -MOST_BIAS <= value <= MOST_BIAS:
            raise bad(f"logit_bias is a number from -{MOST_BIAS} to {MOST_BIAS} for every token", "logit_bias")
        result[int(token)] = value
    return result
