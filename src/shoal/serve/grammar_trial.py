"""Grammars of what clients ask for, tried before the engine builds them: the worst takes minutes, and nobody else shall wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher

from ..data import Tokenizer
from . import grammar_worker
from .errors import bad

LOG = logging.getLogger("shoal.serve")
MOST_GRAMMAR = 200_000
"""Characters of a grammar."""
MOST_KNOWN = 4096
"""Grammars whose trial is remembered: an agent may bring a hundred tools, each with one."""
WHITE_SPACE = r"[ \t\n]{0,16}"


class Trial:
    """Writes grammars for one vocabulary and builds each once, in a process of its own that ends itself where that takes too long.

    Methods raise `APIError` 400 where a grammar cannot be used; `param` is the field of the request it comes from.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._vocabulary = tokenizer.json, max(vocab_size, tokenizer.vocab_size), tokenizer.eos_id
        self._thread = ThreadPoolExecutor(1, "shoal-trial")
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[bytes, str] = {}
        """What was wrong with grammars ("": nothing), by their digests."""

    async def json_object(self) -> str:
        """Any JSON object."""
        return await self.json_schema({"type": "object"}, False, "response_format")

    async def json_schema(self, schema: dict[str, Any], strict: bool, param: str) -> str:
        """JSON that fits a schema; what llguidance cannot hold it to is refused if `strict`, and otherwise left out where that can be."""
        return await self._passed(_of_schema(_bounded(schema, strict)), "the JSON schema", param)

    async def arguments(self, schema: dict[str, Any], strict: bool) -> str:
        """The JSON schema that the arguments of a tool are held to: any object where its own cannot be used and it is not `strict`.

        The schemas of an agent's tools are not its user's to change.
        """
        held = _bounded({"type": "object", **schema}, strict)
        if not strict:
            grammar = _of_schema(held)
            is_new = _digest(grammar) not in self._known
            complaint = await self._complaint(grammar)
            if complaint and is_new:
                # Neither its name nor what is wrong, which quotes it: the log holds nothing that a client wrote.
                LOG.info("the arguments of a tool are held to no schema, as its own cannot be used")
            if complaint:
                held = _bounded({"type": "object"}, strict)
        return json.dumps(held)

    async def regex(self, pattern: str, param: str) -> str:
        """Text that matches a regular expression as a whole."""
        try:
            pattern.encode()
        except UnicodeEncodeError:
            raise bad("the regular expression holds half a character, which is not valid Unicode", param) from None
        return await self._passed(LLMatcher.grammar_from_regex(pattern), "the regular expression", param)

    async def choice(self, options: Sequence[str], param: str) -> str:
        """One of several texts."""
        if not options or not all(options):
            raise bad("give at least one choice, and no empty ones", param)
        return await self.regex("|".join(f"({re.escape(option)})" for option in options), param)

    async def calls(self, source: str) -> str:
        """Tool calls, in llguidance's dialect of Lark."""
        return await self._passed(LLMatcher.grammar_from_lark(source), "the tools' parameters", "tools")

    def close(self) -> None:
        """End the process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._process is not None:
            self._process.kill()
            _leave(self._process)

    async def _passed(self, grammar: str, what: str, param: str) -> str:
        complaint = await self._complaint(grammar)
        if complaint:
            raise bad(f"{what} cannot be used: {complaint}", param)
        return grammar

    async def _complaint(self, grammar: str) -> str:
        """What is wrong with a grammar, in a line."""
        if len(grammar) > MOST_GRAMMAR:
            return f"with {len(grammar)} characters it is too large, {MOST_GRAMMAR} are the most"
        known = self._known.get(_digest(grammar))
        return known if known is not None else await asyncio.get_running_loop().run_in_executor(self._thread, self._try, grammar)

    def _try(self, grammar: str) -> str:
        """On the thread, which has one tried after the other."""
        key = _digest(grammar)
        if key not in self._known:
            self._known[key] = self._ask(grammar)
            if len(self._known) > MOST_KNOWN:
                del self._known[next(iter(self._known))]
        return self._known[key]

    def _ask(self, grammar: str) -> str:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", grammar_worker.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._send(self._vocabulary)
        self._send(grammar)
        assert self._process.stdout is not None
        told = self._process.stdout.readline()
        if told:
            return str(json.loads(told))
        _leave(self._process)
        return f"it is too complex, to build it takes more than {grammar_worker.MOST_SECONDS:g} s"

    def _send(self, value: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what has ended says nothing, which tells enough
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()


def _digest(grammar: str) -> bytes:
    return hashlib.sha256(grammar.encode()).digest()


def _leave(process: subprocess.Popen[str]) -> None:
    """Wait for a process that ends, and close the pipes to it."""
    with contextlib.suppress(OSError), process:
        pass


def _bounded(schema: dict[str, Any], strict: bool) -> dict[str, Any]:
    """The schema with little white space between its parts: a small model may otherwise never end it."""
    return schema | {"x-guidance": {"whitespace_pattern": WHITE_SPACE, "lenient": not strict, "coerce_one_of": not strict}}


def _of_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema))
