"""One request on its way through the engine: its sequence, its sampler, and what of its answer can be shown."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ..config import ModelConfig
from ..data import Tokenizer
from .requests import DraftFate, FinishReason, Increment, PromptReport, Request, Token
from .sampling import Rows, Sampler, log_probabilities, most_likely
from .scheduler import Sequence
from .text import StopStrings, TextStream


class Answer:
    """Grows token by token; `take` gives what was added since the last time."""

    def __init__(self, request: Request, sequence: Sequence, sampler: Sampler, tokenizer: Tokenizer | None, most_tokens: int) -> None:
        self.request, self.sequence, self.sampler = request, sequence, sampler
        self._stream = TextStream(tokenizer, request.prompt) if tokenizer is not None else None
        self._stops = StopStrings(request.sampling.stop)
        self._most_tokens = most_tokens
        self._made = 0
        self._text = ""
        self._tokens: list[Token] = []
        self.prompt: PromptBuilder | None = PromptBuilder(request)
        """Until the prompt has been read and reported."""
        self._report: PromptReport | None = None
        self.finish_reason: FinishReason | None = None
        self._stopped_by: int | str | None = None
        self._error: str | None = None

    def prompt_is_read(self) -> None:
        """The whole prompt is computed: its report is ready."""
        if self.prompt is None:
            return
        self._report, self.prompt = self.prompt.report(), None
        self.sequence.reads_all = False
        if not self._most_tokens:
            self.finish("length")

    def extend(self, token: int, rows: Rows, row: int, draft: int | None, experts: np.ndarray | None) -> None:
        """Add `token`, chosen from logits `row` where multi-token prediction had guessed `draft`."""
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if self.request.sampling.logprobs is not None:
            logprobs = log_probabilities(rows.table[row])
            logprob, top = float(logprobs[token]), most_likely(logprobs, self.request.sampling.logprobs)
        guess: DraftFate | None = None
        if draft is not None:
            guess = "accepted" if draft == token else "rejected"
        self._tokens.append(Token(token, logprob, top, guess, experts))
        self.sequence.tokens.append(token)
        self._made += 1
        may_stop = self.sampler.may_stop
        if token in self.sampler.stops and may_stop:
            self.finish("stop", token)
            return
        self.sampler.accept(token)
        if self._stream is not None:
            piece = self._stream.push(token)
            if self._made < self.request.sampling.min_tokens or not may_stop:
                self._text += self._stops.finish() + piece
            else:
                self._text += self._stops.push(piece)
                if self._stops.found is not None:
                    self.finish("stop", self._stops.found)
                    return
        if self._made == self._most_tokens or len(self.sequence.tokens) == self.sequence.limit:
            self.finish("length")

    def finish(self, reason: FinishReason, stopped_by: int | str | None = None, error: str | None = None) -> None:
        """Nothing more comes."""
        if self._stream is not None and self._stops.found is None:
            self._text += self._stops.push(self._stream.finish())
            self._text += self._stops.finish()
        if self._stops.found is not None and reason == "length":
            reason, stopped_by = "stop", self._stops.found
        self.finish_reason, self._stopped_by, self._error = reason, stopped_by, error

    def take(self) -> Increment | None:
        """What was added; None if nothing was."""
        if not (self._tokens or self._text or self._report or self.finish_reason):
            return None
        increment = Increment(self._text, tuple(self._tokens), self._report, self.finish_reason, self._stopped_by, self._error)
        self._text, self._tokens, self._report = "", [], None
        return increment


class PromptBuilder:
    """Collects what is wanted about a prompt while it is read in pieces."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.cached_tokens: int | None = None
        self.restart()

    def restart(self) -> None:
        """Reading begins (again)."""
        self._logprobs: list[Token] = [Token(self._request.prompt[0])]
        self._sum: np.ndarray | None = None
        self._experts: list[np.ndarray] = []

    @property
    def reads_all(self) -> bool:
        """Whether every token of the prompt has to be computed."""
        request = self._request
        return request.sampling.prompt_logprobs is not None or request.embed or (request.experts and request.prompt_experts)

    @property
    def wants_logits(self) -> bool:
        return self._request.sampling.prompt_logprobs is not None

    def add_logits(self, logits: np.ndarray) -> None:
        """Of the next positions, `[n, V]`."""
        for logprobs in log_probabilities(logits):
            if len(self._logprobs) == len(self._request.prompt):
                return  # the last position predicts the answer
            token = self._request.prompt[len(self._logprobs)]
            top = most_likely(logprobs, self._request.sampling.prompt_logprobs or 0)
            self._logprobs.append(Token(token, float(logprobs[token]), top))

    def add_hidden(self, hidden: np.ndarray) -> None:
        """Of the next positions, `[n, D]`."""
        if self._request.embed:
            total = hidden.sum(0, dtype=np.float64)
            self._sum = total if self._sum is None else self._sum + total

    def add_experts(self, experts: np.ndarray) -> None:
        """Of the next positions, `[MoE layers, n, K]`."""
        if self._request.experts:
            self._experts.append(experts)

    def report(self) -> PromptReport:
        """All of it."""
        return PromptReport(
            self.cached_tokens or 0,
            tuple(self._logprobs) if self.wants_logits else None,
            (self._sum / len(self._request.prompt)).astype(np.float32) if self._sum is not None else None,
            np.concatenate(self._experts, 1) if self._experts else None,
        )


def stop_set(tokenizer: Tokenizer | None, config: ModelConfig) -> Collection[int]:
    """Tokens that end a text: the tokenizer's, and all that the model's files name as such."""
    several = config.extra.get("eos_token_id")
    ends = set(several) if isinstance(several, list) else set()
    if config.eos_token_id is not None:
        ends.add(config.eos_token_id)
    if tokenizer is not None:
        ends.add(tokenizer.eos_id)
    return ends
