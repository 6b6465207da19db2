"""Conversations as the text a model reads: the one rendering that training, the terminal and the server share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from datetime import datetime
from functools import lru_cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.ext import Extension

from ..config import UserError
from .tokenizer import Tokenizer

BUILT_IN = ("r1", "v3.1")
THOUGHT_MARKS = ("<think>", "</think>")
PRIVATE_USE = range(0xE000, 0xF900)
"""Characters that nobody uses."""


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The conversation as the tokenizer's chat template writes it, ready for the assistant's turn if `add_generation_prompt`.

    `messages` and `tools` have OpenAI's shape; `variables` are what the template knows besides (`thinking` in DeepSeek-V3.1's).
    `encode_chat` gives its tokens. Raises `UserError` where there is no template or it refuses the conversation.
    """
    return _render(tokenizer, messages, tools, add_generation_prompt, ("", ""), variables)


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the model writes, between the two marks that the variable `MARKS` holds."""

    tags = {"generation"}  # noqa: RUF012  a set in the class is how jinja2 wants it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        (begin, end), text = context.get(MARKS), caller()
        return f"{begin}{text}{end}" if text else ""


MARKS = "__marks"
"""Name of two texts among the template's variables."""


def _render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
    marks: tuple[str, str],
    variables: dict[str, Any],
) -> str:
    """The text of a conversation, with `marks` around what the model writes."""
    source = tokenizer.template(bool(tools))
    if source is None:
        raise UserError("this is a base model without a chat template: let it complete text instead")
    end = tokenizer.decode([tokenizer.eos_id], skip_special=False)

    def raise_exception(message: str) -> None:
        raise UserError(f"the chat template refuses this conversation: {message}")

    try:
        return _compile(source).render(
            {"bos_token": "", **tokenizer.special_texts, "eos_token": end, **variables},
            messages=messages,
            tools=tools or None,
            add_generation_prompt=add_generation_prompt,
            raise_exception=raise_exception,
            **{MARKS: marks},
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
) -> list[int]:
    """The tokens of what `render_chat` gives. Control tokens come from the template alone: where a message spells one, it is text.

    Of an assistant's message, `<think>` and `</think>` stay control tokens, as it may hold the thought.
    """
    messages, tools, mark = _broken_controls(tokenizer, messages, tools)
    text = render_chat(tokenizer, messages, tools, add_generation_prompt, **variables)
    return _encode(tokenizer, text, mark, [])


def encode_turns(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> list[tuple[list[int], bool]]:
    """The same tokens of a finished conversation, cut where the model begins and ends to write: pieces, and whether it writes them.

    The pieces are encoded one by one, each behind those before: so the tokens before an answer are those of the prompt that asks for it.
    Raises `UserError` also where the template does not mark what the model writes with `{% generation %}`.
    """
    messages, tools, mark = _broken_controls(tokenizer, messages, tools)
    text = _render(tokenizer, messages, tools, False, ("", ""), {})
    # Where an answer lies is told by marks around it, wherever the template holds it (macros, blocks) before it is written.
    begin, end = (chr(code) for code in islice((code for code in PRIVATE_USE if chr(code) not in text), 2))
    marked = _render(tokenizer, messages, tools, False, (begin, end), {})
    pieces = re.split(f"{begin}([^{begin}{end}]*){end}", marked)  # what the model writes at every other place
    if "".join(pieces) != text:
        raise UserError(
            "the chat template changes what stands in its {% generation %} after that: put the change inside, and no other in it"
        )
    if len(pieces) == 1:
        raise UserError(
            "nothing in these conversations is marked as the model's: they need an answer, and the chat template "
            f"{{% generation %}} around it; --chat-template {' or '.join(BUILT_IN)} has it"
        )
    turns: list[tuple[list[int], bool]] = []
    last: list[int] = []
    for i, piece in enumerate(pieces):
        if piece:
            turns.append((_encode(tokenizer, piece, mark, last), i % 2 == 1))
            last = turns[-1][0][-1:] or last
    return turns


def _broken_controls(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, str]:
    """Messages and tools in which a character that nobody uses breaks up what looks like a control token until the template is done.

    Also that character; none ("") where nothing looks like one.
    """
    controls = tokenizer.control_texts
    own = {control for control in controls if control not in THOUGHT_MARKS}
    try:
        said = json.dumps([messages, tools], ensure_ascii=False)
        if not any(control in said for control in controls):
            return messages, tools, ""
        mark = next(chr(code) for code in PRIVATE_USE if chr(code) not in said)
        messages = [_broken_up(message, own if message.get("role") == "assistant" else controls, mark) for message in messages]
        return messages, _broken_up(tools, controls, mark), mark
    except RecursionError:
        raise UserError("this conversation is nested too deeply: make its tools and messages flatter") from None


def _encode(tokenizer: Tokenizer, text: str, mark: str, behind: list[int]) -> list[int]:
    """The tokens of a rendered text that goes on `behind` others: control tokens but for those that `mark` breaks up, which are text."""
    if not mark:
        return tokenizer.encode(text, special=True, behind=behind)
    forged = "|".join(re.escape(_break(control, mark)) for control in sorted(tokenizer.control_texts, key=len, reverse=True))
    ids: list[int] = []
    for i, part in enumerate(re.split(f"({forged})", text)):
        ids += tokenizer.encode(part.replace(mark, ""), special=i % 2 == 0, behind=ids or behind)
    return ids


def _break(control: str, mark: str) -> str:
    return control[:1] + mark + control[1:]


def _broken_up(value: Any, controls: Collection[str], mark: str) -> Any:
    """`value` with `mark` inside of every control token that its strings spell."""
    if isinstance(value, str):
        for control in controls:
            value = value.replace(control, _break(control, mark))
        return value
    if isinstance(value, dict):
        return {_broken_up(key, controls, mark): _broken_up(item, controls, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_broken_up(item, controls, mark) for item in value]
    return value


def built_in_template(name: str) -> str:
    """Source of one of the templates `BUILT_IN`."""
    return (resources.files(__package__) / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def refuse_template(source: str) -> str | None:
    """Why this is no Jinja template; None where it is one."""
    try:
        _compile(source)
    except jinja2.TemplateSyntaxError as error:
        return f"is no Jinja template (line {error.lineno}: {error.message})"
    return None


def read_template(name: str) -> str:
    """Source of one of the templates `BUILT_IN`, by name, or of a Jinja file. Raises `UserError` where it is neither."""
    if name in BUILT_IN:
        return built_in_template(name)
    file = Path(name).expanduser()
    if not file.is_file():
        raise UserError(f"there is no chat template at {file}: give a Jinja file or one of {', '.join(BUILT_IN)}")
    try:
        source = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the chat template {file} is not valid UTF-8 (byte {error.start}): check its encoding") from None
    except OSError as error:
        raise UserError(f"the chat template {file} cannot be read ({error.strerror}): check its permissions") from None
    if (why := refuse_template(source)) is not None:
        raise UserError(f"{file} {why}: repair it, or give another")
    return source


@lru_cache(16)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
