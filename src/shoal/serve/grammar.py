"""Answers of a given form as token masks, through llguidance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache

import llguidance
import numpy as np

from ..data import Tokenizer
from ..engine.sampling import SamplingError

MOST_BUILT = 32
"""Grammars that are kept: an agent sends the same tools with every request, and all choices of a request have the same."""

SPELLS = "the form of the answer cannot be kept: it prescribes a text that spells a control token of this model"
"""llguidance would write that text with the token."""


class Grammars:
    """Builds grammars, which `Trial` has let pass, for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Iterable[int]) -> None:
        """`ends` are the tokens at which the engine ends a text."""
        self.vocab_size = vocab_size
        self.ends = [token for token in ends if token < vocab_size]
        size = max(vocab_size, tokenizer.vocab_size)
        backend = llguidance.LLTokenizer(tokenizer.json, n_vocab=size, eos_token=tokenizer.eos_id)
        self._built = lru_cache(MOST_BUILT)(lambda grammar: llguidance.LLMatcher(backend, grammar, log_level=0))

    def matcher(self, grammar: str) -> Matcher:
        """A fresh walk through a grammar. To build one may take seconds, in which other threads go on."""
        return Matcher(self._built(grammar).deep_copy(), self.vocab_size, self.ends)

    def mask(self, form: AnswerForm) -> AnswerMask:
        """The mask that holds one answer to a form; see `matcher` on how long it takes."""
        return AnswerMask(self, form)


class Matcher:
    """Where an answer stands in a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, ends: list[int]) -> None:
        self._matcher, self._vocab_size, self._ends = matcher, vocab_size, ends
        self._mask: np.ndarray | None = None

    def allowed(self) -> np.ndarray:
        """Bool `[V]` of the tokens that may follow; end-of-text among them where the grammar may end."""
        if self._mask is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if self._matcher.is_error():
                reason = self._matcher.get_error().splitlines()[0]
                raise SamplingError(SPELLS if "forced bytes" in reason else f"the form of the answer cannot be kept: {reason}")
            self._mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
            if self._mask[self._ends].any() and not self.may_end:  # the engine would end the text there
                self._mask[self._ends] = False
                if not self._mask.any():
                    raise SamplingError(SPELLS)
        return self._mask

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._mask = None

    @property
    def may_end(self) -> bool:
        return self._matcher.is_accepting()


class Phase(Enum):
    THINKING = auto()
    """Between `<think>` and `</think>`: anything goes."""
    OPEN = auto()
    """At the beginning of the answer proper."""
    FREE = auto()
    """In the answer proper, with no form prescribed."""
    FORMED = auto()
    """In the grammar of the answer, to the end."""
    CALLING = auto()
    """In the grammar of tool calls, to the end."""


@dataclass(frozen=True)
class AnswerForm:
    """What an answer has to look like: free thought, then what `answer` prescribes (None: anything), or tool calls of the form `calls`.

    Calls begin with the token `calls_begin`; with `must_call` the answer is made of them. `think_end` ends the thought;
    `may_think` is the token that may open one before the answer.
    """

    answer: str | None = None
    calls: str | None = None
    calls_begin: int | None = None
    must_call: bool = False
    thinking: bool = False
    think_end: int | None = None
    may_think: int | None = None


class AnswerMask:
    """Where one answer stands in its form. Implements the engine's `TokenMask`."""

    def __init__(self, grammars: Grammars, form: AnswerForm) -> None:
        self._grammars, self._form = grammars, form
        self._may_think = form.may_think
        self._phase = Phase.THINKING if form.thinking else Phase.OPEN
        wants_answer = form.answer is not None and not form.must_call
        self._answer = grammars.matcher(form.answer) if form.answer is not None and wants_answer else None
        self._calls = grammars.matcher(form.calls) if form.calls is not None else None

    @property
    def is_whole(self) -> bool:
        return self._phase is not Phase.CALLING or (self._calls is not None and self._calls.may_end)

    def allowed(self) -> np.ndarray | None:
        formed = self._formed
        if formed is not None:
            return formed.allowed()
        prescribes = self._form.must_call or self._answer is not None
        if self._phase is Phase.FREE or not prescribes:
            return None
        if self._phase is Phase.THINKING:
            mask = np.ones(self._grammars.vocab_size, bool)
            mask[self._grammars.ends] = False  # the answer is still to come
            return mask
        mask = np.zeros(self._grammars.vocab_size, bool) if self._answer is None else self._answer.allowed().copy()
        for token in (self._form.calls_begin, self._may_think):
            if token is not None:
                mask[token] = True
        return mask

    def accept(self, token: int) -> None:
        formed = self._formed
        if formed is not None:
            formed.accept(token)
        elif self._phase is Phase.THINKING:
            if token == self._form.think_end:
                self._phase, self._may_think = Phase.OPEN, None
        elif self._calls is not None and token == self._form.calls_begin:
            self._phase = Phase.CALLING
        elif self._phase is Phase.OPEN and token == self._may_think:
            self._phase = Phase.THINKING
        elif self._answer is not None:
            self._phase = Phase.FORMED
            self._answer.accept(token)
        else:
            self._phase = Phase.FREE

    @property
    def _formed(self) -> Matcher | None:
        """The grammar that the answer is in."""
        return {Phase.FORMED: self._answer, Phase.CALLING: self._calls}.get(self._phase)
