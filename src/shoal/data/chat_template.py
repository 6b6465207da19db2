"""Conversations as the text a model reads: the one rendering that training, the terminal and the server share."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import lru_cache
from importlib import resources
from typing import Any

import jinja2
import jinja2.sandbox

from ..config import UserError
from .tokenizer import Tokenizer

BUILT_IN = ("r1", "v3.1")
THOUGHT_MARKS = ("<think>", "</think>")


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The conversation as the tokenizer's chat template writes it, ready for the assistant's turn if `add_generation_prompt`.

    `messages` and `tools` have OpenAI's shape; `variables` are what the template knows besides (`thinking` in DeepSeek-V3.1's).
    `encode_chat` gives its tokens as well. Raises `UserError` where there is no template or it refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise UserError("this is a base model without a chat template: let it complete text instead")

    def raise_exception(message: str) -> None:
        raise UserError(f"the chat template refuses this conversation: {message}")

    try:
        return _compile(tokenizer.chat_template).render(
            messages=messages,
            tools=tools or None,
            add_generation_prompt=add_generation_prompt,
            raise_exception=raise_exception,
            bos_token=_special(tokenizer, tokenizer.bos_id),
            eos_token=_special(tokenizer, tokenizer.eos_id),
            **variables,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template cannot be used: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        # Raised by an expression of the template that this conversation does not suit.
        raise UserError(f"the chat template cannot write this conversation: {error}") from None


def encode_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> tuple[str, list[int]]:
    """What `render_chat` gives, and its tokens. Control tokens come from the template alone: where a message spells one, it is text.

    Of an assistant's message, `<think>` and `</think>` stay control tokens, as it may hold the thought.
    """
    controls = tokenizer.control_texts
    said = json.dumps([messages, tools], ensure_ascii=False)
    if not any(control in said for control in controls):
        text = render_chat(tokenizer, messages, tools, add_generation_prompt, **variables)
        return text, tokenizer.encode(text, special=True)
    # A character that nobody uses breaks up what looks like a control token until the template is done.
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in said)
    own = {control for control in controls if control not in THOUGHT_MARKS}
    messages = [_broken_up(message, own if message.get("role") == "assistant" else controls, mark) for message in messages]
    text = render_chat(tokenizer, messages, _broken_up(tools, controls, mark), add_generation_prompt, **variables)
    forged = "|".join(re.escape(_break(control, mark)) for control in sorted(controls, key=len, reverse=True))
    ids: list[int] = []
    for i, part in enumerate(re.split(f"({forged})", text)):
        ids += tokenizer.encode(part.replace(mark, ""), special=i % 2 == 0)
    return text.replace(mark, ""), ids


def _break(control: str, mark: str) -> str:
    return control[:1] + mark + control[1:]


def _broken_up(value: Any, controls: Collection[str], mark: str) -> Any:
    """`value` with `mark` inside of every control token that its strings spell."""
    if isinstance(value, str):
        for control in controls:
            value = value.replace(control, _break(control, mark))
        return value
    if isinstance(value, dict):
        return {key: _broken_up(item, controls, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_broken_up(item, controls, mark) for item in value]
    return value


def built_in_template(name: str) -> str:
    """Source of one of the templates `BUILT_IN`."""
    return (resources.files(__package__) / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@lru_cache(16)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    """Jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _special(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.decode([token], skip_special=False)
