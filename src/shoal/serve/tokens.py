"""Tokens as clients see them: texts, bytes, log-probabilities, experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data import Tokenizer
from ..engine import TextStream, Token

LEAST = -9999.0
"""In place of minus infinity, which JSON cannot hold."""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Text of one token; with OpenAI's escape where it is not whole characters."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": token_text(tokenizer, token), "logprob": max(logprob, LEAST), "bytes": list(raw)}

    content = []
    for token in tokens:
        if token.logprob is not None:
            content.append(entry(token.id, token.logprob) | {"top_logprobs": [entry(*top) for top in token.top]})
    return {"content": content, "refusal": None}


class Offsets:
    """Where the tokens of a text begin in it, in characters from `start` on; tokens within a character begin where it does.

    `behind`: the tokens that the text continues.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0, behind: Sequence[int] = ()) -> None:
        self._stream, self._at = TextStream(tokenizer, behind), start

    def next(self, token: int) -> int:
        """Where `token` begins, which follows those before."""
        at = self._at
        self._at += len(self._stream.push(token))
        return at


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], count: int, offsets: Sequence[int]) -> dict[str, Any]:
    """`logprobs` of a completion, with `count` alternatives; `offsets`: where each of the tokens begins in the text."""
    known = [token.logprob is not None for token in tokens]
    tops = [{token_text(tokenizer, id): max(value, LEAST) for id, value in token.top[:count]} for token in tokens]
    return {
        "tokens": [token_text(tokenizer, token.id) for token in tokens],
        "token_logprobs": [None if token.logprob is None else max(token.logprob, LEAST) for token in tokens],
        "top_logprobs": [top if there else None for top, there in zip(tops, known, strict=True)],
        "text_offset": list(offsets),
    }


def prompt_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[dict[str, Any] | None]:
    """By token id, as vLLM writes them; None for the first token, which nothing predicts."""
    report: list[dict[str, Any] | None] = []
    for token in tokens:
        if token.logprob is None:
            report.append(None)
            continue
        ranks = {id: (rank, value) for rank, (id, value) in enumerate(token.top, 1)}
        ranks.setdefault(token.id, (None, token.logprob))  # type: ignore[arg-type]
        report.append(
            {
                str(id): {"logprob": max(value, LEAST), "rank": rank, "decoded_token": token_text(tokenizer, id)}
                for id, (rank, value) in ranks.items()
            }
        )
    return report


def expert_report(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """For the expert view: `experts` is `[MoE layers][K]`, `draft` whether multi-token prediction had guessed the token."""
    return [
        {
            "id": token.id,
            "text": tokenizer.decode([token.id], skip_special=False),
            "draft": token.draft,
            "experts": None if token.experts is None else token.experts.tolist(),
        }
        for token in tokens
    ]
