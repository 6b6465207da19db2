"""Answers of a given form: JSON schemas, regular expressions, choices and tool calls as token masks, through llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import llguidance
import numpy as np

from ..data import Tokenizer
from .errors import bad

MOST_GRAMMAR = 200_000
"""Characters of a grammar."""
WHITE_SPACE = r"[ \t\n]{0,16}"


class Grammars:
    """Compiles grammars for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eos_id = tokenizer.eos_id
        size = max(vocab_size, tokenizer.vocab_size)
        self._tokenizer = llguidance.LLTokenizer(tokenizer.json, n_vocab=size, eos_token=tokenizer.eos_id)

    def json_object(self) -> str:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, "response_format")

    def json_schema(self, schema: dict[str, Any], param: str) -> str:
        """JSON that fits a schema. Raises `APIError` 400 where the schema is none or uses what is not supported."""
        return self._checked(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(bounded(schema))), "the JSON schema", param)

    def regex(self, pattern: str, param: str) -> str:
        """Text that matches a regular expression as a whole."""
        try:
            pattern.encode()
        except UnicodeEncodeError:
            raise bad("the regular expression holds half a character, which is not valid Unicode", param) from None
        return self._checked(llguidance.LLMatcher.grammar_from_regex(pattern), "the regular expression", param)

    def choice(self, options: Sequence[str], param: str) -> str:
        """One of several texts."""
        if not options or not all(options):
            raise bad("give at least one choice, and no empty ones", param)
        return self.regex("|".join(f"({re.escape(option)})" for option in options), param)

    def lark(self, source: str, param: str) -> str:
        """A grammar in llguidance's dialect of Lark."""
        return self._checked(llguidance.LLMatcher.grammar_from_lark(source), "the tools' parameters", param)

    def matcher(self, grammar: str) -> Matcher:
        """A fresh walk through a grammar."""
        return Matcher(llguidance.LLMatcher(self._tokenizer, grammar, log_level=0), self.vocab_size)

    def mask(self, form: AnswerForm) -> AnswerMask:
        """The mask that holds one answer to a form."""
        return AnswerMask(self, form)

    def _checked(self, grammar: str, what: str, param: str) -> str:
        if len(grammar) > MOST_GRAMMAR:
            raise bad(f"{what} is too large", param)
        complaint = llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer)
        if complaint and not complaint.startswith("WARNING"):
            raise bad(f"{what} cannot be used: {' '.join(complaint.split())[:300]}", param)
        return grammar


def bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with little white space between its parts: a small model may otherwise never end it."""
    return schema | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}}


class Matcher:
    """Where an answer stands in a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._mask: np.ndarray | None = None

    def allowed(self) -> np.ndarray:
        """Bool `[V]` of the tokens that may follow; end-of-text among them where the grammar may end."""
        if self._mask is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if self._matcher.is_error():
                raise RuntimeError(f"the grammar failed: {self._matcher.get_error().splitlines()[0]}")
            self._mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        return self._mask

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._mask = None


class Phase(Enum):
    THINKING = auto()
    """Between `<think>` and `</think>`: anything goes."""
    OPEN = auto()
    """At the beginning of the answer proper."""
    FREE = auto()
    """In the answer proper, with no form prescribed."""
    FORMED = auto()
    """In a grammar, to the end."""


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
        self._matcher: Matcher | None = None
        if form.answer is not None and not form.must_call:
            self._matcher = grammars.matcher(form.answer)

    def allowed(self) -> np.ndarray | None:
        if self._phase is Phase.FORMED:
            assert self._matcher is not None
            return self._matcher.allowed()
        prescribes = self._form.must_call or self._form.answer is not None
        if self._phase is Phase.FREE or not prescribes:
            return None
        if self._phase is Phase.THINKING:
            mask = np.ones(self._grammars.vocab_size, bool)
            mask[self._grammars.eos_id] = False  # the answer is still to come
            return mask
        mask = np.zeros(self._grammars.vocab_size, bool) if self._matcher is None else self._matcher.allowed().copy()
        for token in (self._form.calls_begin, self._may_think):
            if token is not None:
                mask[token] = True
        return mask

    def accept(self, token: int) -> None:
        if self._phase is Phase.THINKING:
            if token == self._form.think_end:
                self._phase, self._may_think = Phase.OPEN, None
        elif self._phase is Phase.FORMED:
            assert self._matcher is not None
            self._matcher.accept(token)
        elif self._form.calls is not None and token == self._form.calls_begin:
            self._phase, self._matcher = Phase.FORMED, self._grammars.matcher(self._form.calls)
        elif self._phase is Phase.OPEN and token == self._may_think:
            self._phase = Phase.THINKING
        elif self._matcher is not None:
            self._phase = Phase.FORMED
            self._matcher.accept(token)
        else:
            self._phase = Phase.FREE
