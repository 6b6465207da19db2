"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from ..config import SamplingOptions

FinishReason = Literal["stop", "length", "abort", "error"]
"""`stop`: end of text, a stop token or a stop string. `length`: max_tokens, or the context or the cache is full."""

DraftFate = Literal["accepted", "rejected"]


class TokenMask(Protocol):
    """Says which tokens may come next: the way in for grammars. One object serves one request."""

    def allowed(self) -> np.ndarray | None:
        """Bool `[V]` of the tokens that may follow those accepted so far; None: any. May be called several times at one place."""
        ...

    def accept(self, token: int) -> None:
        """`token` was chosen. With speculation, guesses are checked one after the other, and only chosen tokens come here."""
        ...

    @property
    def is_whole(self) -> bool:
        """False where the answer must not end yet, such as within a tool call: stop tokens and stop strings then end nothing."""
        ...


@dataclass
class Request:
    """One prompt and what is wanted for it."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """`max_tokens` 0 only reads the prompt: for scoring and embedding."""
    mask: Any = None
    """A `TokenMask`; on its way to a worker, plain data of which the engine's `make_mask` makes one."""
    embed: bool = False
    """Return the mean of the prompt's hidden states."""
    experts: bool = False
    """Return which experts every token was sent to."""
    prompt_experts: bool = True
    """With `experts`: also those of the prompt, which then has to be computed even where the prefix cache knows it."""


class Token(NamedTuple):
    """One token of an answer or of a prompt."""

    id: int
    logprob: float | None = None
    """Log-probability under the model itself (before temperature, penalties, masks); None unless asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens here and their log-probabilities, best first."""
    draft: DraftFate | None = None
    """Whether multi-token prediction had guessed it; None where it made no guess."""
    experts: np.ndarray | None = None
    """`[MoE layers, K]` int16: the experts that computed the prediction of this token; None unless asked for."""


@dataclass(frozen=True)
class PromptReport:
    """What reading the prompt gave."""

    cached_tokens: int
    """Tokens of the prompt that the prefix cache knew already."""
    logprobs: tuple[Token, ...] | None = None
    """One for every token of the prompt (the first has no log-probability); None unless asked for."""
    embedding: np.ndarray | None = None
    """`[D]` fp32, the mean hidden state after the final norm; None unless asked for."""
    experts: np.ndarray | None = None
    """`[MoE layers, prompt tokens, K]` int16; None unless asked for."""


class Increment(NamedTuple):
    """What a step, or several, added to an answer."""

    text: str = ""
    """Whole characters that can no longer turn out to belong to a stop string; without the stop itself."""
    tokens: tuple[Token, ...] = ()
    """May run ahead of the text. A stop token is among them."""
    prompt: PromptReport | None = None
    """With the first increment of a request."""
    finish_reason: FinishReason | None = None
    """Set in the last increment of a request."""
    stopped_by: int | str | None = None
    """The stop token or stop string that ended the answer."""
    error: str | None = None
    """One line, where `finish_reason` is `error`."""


def join(increments: Sequence[Increment]) -> Increment:
    """What several steps, one after the other, added to one answer."""
    if len(increments) == 1:
        return increments[0]
    return increments[-1]._replace(
        text="".join(increment.text for increment in increments),
        tokens=tuple(token for increment in increments for token in increment.tokens),
        prompt=increments[0].prompt,
    )


@dataclass
class Result:
    """A whole answer."""

    prompt_tokens: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt: PromptReport = field(default_factory=lambda: PromptReport(0))
    finish_reason: FinishReason | None = None
    stopped_by: int | str | None = None
    error: str | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def add(self, increment: Increment) -> None:
        """Append what one step gave."""
        self.text += increment.text
        self.tokens += increment.tokens
        self.prompt = increment.prompt or self.prompt
        self.finish_reason, self.stopped_by, self.error = increment.finish_reason, increment.stopped_by, increment.error
