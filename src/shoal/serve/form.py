"""The form that a request prescribes for its answer, as a grammar."""

from __future__ import annotations

from typing import Any

from .errors import bad
from .grammar_trial import Trial
from .protocol import ChatBody, CompletionBody


async def answer_grammar(body: ChatBody | CompletionBody, trial: Trial) -> str | None:
    """Grammar of `response_format`, or of `guided_json`, `guided_regex` or `guided_choice` (vLLM's); None where the answer is free."""
    asked = [value is not None for value in (body.response_format, body.guided_json, body.guided_regex, body.guided_choice)]
    if sum(asked) > 1:
        raise bad("give one of response_format, guided_json, guided_regex and guided_choice", "response_format")
    if body.guided_json is not None:
        return await trial.json_schema(body.guided_json, False, "guided_json")
    if body.guided_regex is not None:
        return await trial.regex(body.guided_regex, "guided_regex")
    if body.guided_choice is not None:
        return await trial.choice(body.guided_choice, "guided_choice")
    return None if body.response_format is None else await _of_format(body.response_format, trial)


async def _of_format(form: dict[str, Any], trial: Trial) -> str | None:
    param, kind = "response_format", form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return await trial.json_object()
    if kind == "json_schema":
        inner = form.get("json_schema", form)
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(schema, dict):
            raise bad("response_format of type json_schema needs a schema", param)
        return await trial.json_schema(schema, inner.get("strict") is True, param)
    if kind == "regex" and isinstance(form.get("regex"), str):
        return await trial.regex(form["regex"], param)
    if kind == "choice" and isinstance(form.get("choice"), list) and all(isinstance(option, str) for option in form["choice"]):
        return await trial.choice(form["choice"], param)
    raise bad("response_format is text, json_object, json_schema, regex (with regex) or choice (with choice)", param)
