"""`shoal sft --preview`: what is learnt of a conversation, token by token."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any

from ..data import Tokenizer
from ..data.conversations import read_conversations, tokenize

LEARNT, READ = "\x1b[1;32m", "\x1b[2m"
END = "\x1b[0m"


def show(tokenizer: Tokenizer, data: Sequence[str], count: int) -> dict[str, Any]:
    """Print the first `count` conversations; tokens that are learnt stand in brackets, and in green on a terminal."""
    colours = sys.stdout.isatty()
    shown = learnt = read = 0
    for place, conversation in islice(read_conversations(data), count):
        example = tokenize(tokenizer, conversation, place)
        print(f"--- {place}: {len(example.ids)} tokens, {int(example.written.sum())} learnt")
        for token, written in zip(example.ids.tolist(), example.written.tolist(), strict=True):
            text = tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")
            marked = f"[{text!r}]" if written else f" {text!r} "
            colour = LEARNT if written else READ
            print(f"{token:>8} {colour if colours else ''}{marked}{END if colours else ''}")
        shown += 1
        learnt += int(example.written.sum())
        read += len(example.ids)
    return {"conversations": shown, "tokens": read, "learnt": learnt}
