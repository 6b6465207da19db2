"""How a model writes conversations, thoughts and tool calls, as far as its chat template and its vocabulary tell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..data import Tokenizer
from ..data.chat_template import encode_chat
from .errors import bad
from .grammar import AnswerForm
from .grammar_trial import Trial
from .protocol import ChatBody, Message, Tool
from .reader import CALL, CALLS, END_CALL, END_CALLS, END_THINK, SEPARATOR, THINK, thinks, thought_of

TEXT_PARTS = ("text", "input_text", "output_text")
NO_THINKING = ("none", "minimal", "off")
OURS = ("messages", "tools", "add_generation_prompt", "raise_exception", "bos_token", "eos_token", "tokenizer")
"""What clients cannot say to a chat template."""


class Dialect:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.chat_template or ""
        self.has_chat = bool(template)
        self.thinks = thinks(tokenizer)
        self.think_is_optional = "thinking" in template
        markers = (CALLS, CALL, SEPARATOR, END_CALL, END_CALLS)
        with_tools = tokenizer.template(tools=True) or ""
        self.calls_tools = CALL in with_tools and "tools" in with_tools and None not in map(tokenizer.token_id, markers)
        self._names_functions = "function'+" in with_tools.replace(" ", "") or f"function{SEPARATOR}" in with_tools
        """R1's form of calls; V3.1's names the tool alone."""

    def prompt(self, body: ChatBody) -> list[int]:
        """The tokens of the conversation."""
        if not self.has_chat:
            raise bad("this is a base model without a chat template: use /v1/completions, or give the server --chat-template", "model")
        wants_tools = bool(body.tools) and body.tool_choice != "none"
        if wants_tools and not self.calls_tools:
            raise bad("this model's chat template knows no tools", "tools")
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if wants_tools else None
        variables: dict[str, Any] = {"thinking": body.reasoning_effort is not None and body.reasoning_effort.lower() not in NO_THINKING}
        for name, value in (body.chat_template_kwargs or {}).items():
            if name not in (*OURS, *self.tokenizer.special_texts):
                variables[name] = value
        variables.setdefault("enable_thinking", variables["thinking"])
        messages = [written(message, index) for index, message in enumerate(body.messages)]
        if body.continue_final_message:
            return self._begun(messages, tools, variables)
        return encode_chat(self.tokenizer, messages, tools, body.add_generation_prompt, **variables)

    def _begun(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: dict[str, Any]) -> list[int]:
        """A conversation whose last message is the beginning of the answer: the turn goes on behind it."""
        last = messages[-1]
        if last["role"] != "assistant" or "tool_calls" in last:
            raise bad("only a text of the assistant can be continued", "messages")
        prompt = encode_chat(self.tokenizer, messages[:-1], tools, True, **variables)
        if thought_of(self.tokenizer, prompt)[0]:
            raise bad("the answer begins with a thought here, so that its text cannot be begun: end with a message of the user", "messages")
        return prompt + self.tokenizer.encode(last["content"], behind=prompt)

    async def form(self, body: ChatBody, prompt: Sequence[int], trial: Trial, answer: str | None) -> AnswerForm | None:
        """What the answers have to look like; None where they are free. `answer` is the grammar of `response_format`."""
        tools, must_call = chosen_tools(body)
        calls = await self._calls_grammar(tools, several_calls(body), trial) if tools else None
        if answer is None and calls is None:
            return None
        thinking, may_think = thought_of(self.tokenizer, prompt)
        return AnswerForm(
            answer,
            calls=calls,
            calls_begin=self.tokenizer.token_id(CALLS) if calls is not None else None,
            must_call=must_call,
            thinking=thinking,
            think_end=self.tokenizer.token_id(END_THINK),
            may_think=self.tokenizer.token_id(THINK) if may_think else None,
        )

    async def _calls_grammar(self, tools: list[Tool], parallel: bool, trial: Trial) -> str:
        """What may follow `CALLS`, in llguidance's Lark."""
        call, separator, end, all_end = (f"<[{self.tokenizer.token_id(marker)}]>" for marker in (CALL, SEPARATOR, END_CALL, END_CALLS))
        more = '("\\n"? call)*' if parallel else ""
        lines = [f"start: call {more} {all_end}", "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
        for i, tool in enumerate(tools):
            schema = await trial.arguments(tool.function.parameters or {}, tool.function.strict is True)
            name = json.dumps(tool.function.name)
            if self._names_functions:
                fenced = json.dumps(f"{tool.function.name}\n```json\n")
                lines.append(f'call_{i}: {call} "function" {separator} {fenced} arguments_{i} "\\n```" {end}')
            else:
                lines.append(f"call_{i}: {call} {name} {separator} arguments_{i} {end}")
            lines.append(f"arguments_{i}: %json {schema}")
        return await trial.calls("\n".join(lines))


def several_calls(body: ChatBody) -> bool:
    """Whether one answer may call more than once: not where a function is named, which is called exactly once."""
    return body.parallel_tool_calls is not False and not isinstance(body.tool_choice, dict)


def chosen_tools(body: ChatBody) -> tuple[list[Tool], bool]:
    """The tools that may be called, and whether one must be."""
    choice, tools = body.tool_choice, body.tools or []
    if isinstance(choice, dict):
        if (kind := choice.get("type", "function")) != "function":
            raise bad(f"tool_choice of type {str(kind)[:40]!r} is not supported: use auto, none, required or a function", "tool_choice")
        name = (choice.get("function") or choice).get("name") if isinstance(choice.get("function") or choice, dict) else None
        named = [tool for tool in tools if tool.function.name == name]
        if not named:
            raise bad("tool_choice names a tool that is not among the tools", "tool_choice")
        return named, True
    if choice == "required" and not tools:
        raise bad("tool_choice is required, but there are no tools", "tool_choice")
    return ([], False) if choice == "none" else (tools, choice == "required")


def written(message: Message, index: int) -> dict[str, Any]:
    """A message as templates take it: `content` a text, `tool_calls` of one shape."""
    param = f"messages[{index}]"
    if message.function_call is not None:
        raise bad("function_call is not supported any more: use tool_calls", param)
    content = message.content or ""
    if not isinstance(content, str):
        content = [{"type": "text", **part} for part in content]  # here a part need not say so
    result: dict[str, Any] = {"role": message.role, "content": texts(content, TEXT_PARTS, param)}
    if message.name is not None:
        result["name"] = message.name
    if message.reasoning_content is not None:
        result["reasoning_content"] = message.reasoning_content
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [_call(call, f"{param}.tool_calls") for call in message.tool_calls]
    return result


def texts(content: Any, kinds: tuple[str, ...], param: str) -> str:
    """The text of content: a text, a part, or a list of parts. Raises `APIError` 400 for parts of other kinds, such as images."""
    if isinstance(content, str):
        return content
    result = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            raise bad(f"this model reads text only: it cannot use parts of type {str(kind)[:40]!r}", param)
        if not isinstance(part.get("text"), str):
            raise bad(f"a part of type {kind} needs a text", param)
        result.append(part["text"])
    return "".join(result)


def _call(call: dict[str, Any], param: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad("a tool call needs a function with a name", param)
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"id": str(call.get("id", "")), "type": "function", "function": {"name": function["name"], "arguments": arguments}}
