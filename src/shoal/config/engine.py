"""How requests are sampled and how the engine schedules them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from .errors import UserError, require_at_least_one

MOST_LOGPROBS = 100
"""Alternatives that a request may ask for at every token."""


@dataclass
class SamplingOptions:
    """How the next token is chosen."""

    max_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.8
    """0 takes the most likely token."""
    top_k: int = 0
    """Only the so many most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability (1904.09751)."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the most likely one (2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of tokens in prompt or answer (1909.05858); 1: off."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens once for each time the answer holds them."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The answer ends before any of these texts."""
    seed: int | None = None
    """None: another text every time."""
    min_tokens: int = 0
    """No end before so many tokens."""
    ignore_eos: bool = False
    """Go on past the end of the text."""
    stop_token_ids: Annotated[tuple[int, ...], tyro.conf.Suppress] = ()
    """The answer ends at any of these tokens, besides end-of-text."""
    logit_bias: Annotated[dict[int, float], tyro.conf.Suppress] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    logprobs: Annotated[int | None, tyro.conf.Suppress] = None
    """Log-probability of every token, with so many alternatives; before temperature, penalties and the like."""
    prompt_logprobs: Annotated[int | None, tyro.conf.Suppress] = None
    """The same for the tokens of the prompt."""

    def validate(self, least_tokens: int = 1) -> None:
        """Raise `UserError` on the first option that cannot work. `least_tokens` 0 allows requests that only read their prompt."""
        if self.max_tokens < least_tokens:
            raise UserError(f"--max-tokens is {self.max_tokens}: it must be at least {least_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}: it must be 0 or more")
        if self.top_k < 0:
            raise UserError(f"--top-k is {self.top_k}: it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}: it must be more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p is {self.min_p}: it must lie between 0 and 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"--repetition-penalty is {self.repetition_penalty}: it must be more than 0")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be a number")
        if "" in self.stop:
            raise UserError("--stop is empty: give text that ends the answer")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UserError(f"--seed is {self.seed}: it must lie between 0 and 2^64 - 1")
        if self.min_tokens < 0:
            raise UserError(f"--min-tokens is {self.min_tokens}: it must be 0 or more")
        if any(math.isnan(bias) for bias in self.logit_bias.values()):
            raise UserError("logit_bias holds something that is not a number")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MOST_LOGPROBS:
                raise UserError(f"{name} is {count}: it must lie between 0 and {MOST_LOGPROBS}")


CacheFormat = Literal["fp32", "bf16", "fp8"]


@dataclass
class RunOptions:
    """How a model runs."""

    cache: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Number format of cached tokens; `auto`: what the model computes in."""
    step_tokens: int = 512
    """Tokens computed in one step: long prompts are read in pieces, so that running answers go on meanwhile."""
    speculate: Literal["auto", "on", "off"] = "auto"
    """Let the model's multi-token prediction guess ahead. Answers stay the same; `auto` does it where it saves time."""
    draft_tokens: int = 3
    """Tokens guessed ahead; `auto` takes as many, one or none, whichever is fastest."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        if self.step_tokens < 2:
            raise UserError(f"--step-tokens is {self.step_tokens}: it must be at least 2")
        if not 1 <= self.draft_tokens <= 8:
            raise UserError(f"--draft-tokens is {self.draft_tokens}: it must lie between 1 and 8")


@dataclass
class EngineOptions(RunOptions):
    """How the engine shares the machine among requests."""

    max_running: int = 64
    """Requests computed at the same time; more of them wait."""
    cache_tokens: int = 0
    """Tokens that the cache holds; 0: one full context for every running request, at most a quarter of the free memory."""
    prefix_cache: bool = True
    """Keep what was computed for one prompt for others that begin in the same way."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        super().validate()
        if self.cache_tokens < 0:
            raise UserError(f"--cache-tokens is {self.cache_tokens}: it must be 0 (choose) or more")
        require_at_least_one(self, "max_running")
        if self.step_tokens <= self.max_running:
            raise UserError(f"--step-tokens is {self.step_tokens}: it must be more than --max-running, {self.max_running}")
