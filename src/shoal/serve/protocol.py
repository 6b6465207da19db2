"""What OpenAI's clients send. Fields that are not named here are ignored, as clients send many; those that would change the answer and are
not supported are named and refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..config.engine import MOST_LOGPROBS
from .errors import bad

MOST_CHOICES = 64
MOST_STOPS = 16
MOST_MESSAGES = 10_000
"""Of a conversation: each takes time before it is known that so many do not fit."""
T = TypeVar("T")
Several = Annotated[list[T], Field(fail_fast=True)]
"""A list that is refused at its first wrong element: to tell all of a million would take the server seconds and gigabytes."""
TokenIds = Annotated[Several[int], Field(min_length=1)]
Logprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
UNSUPPORTED = {
    "structured_outputs": ", or use guided_json, guided_regex or guided_choice",
    "guided_grammar": ", or use guided_json, guided_regex or guided_choice",
    "allowed_token_ids": ", or use logit_bias",
    "bad_words": ", or use logit_bias",
    "use_beam_search": "",
    "truncate_prompt_tokens": "",
    "web_search_options": "",
    "moderation": "",
}
"""Fields of OpenAI's and vLLM's that would change the answer, and what there is instead."""


class Body(BaseModel):
    """One request's JSON."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        """Null says that a field is left away: so it is in OpenAI's description, and some clients write all of them."""
        return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(Body):
    """What all ways to generate share. `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`, `stop_token_ids`,
    `prompt_logprobs`, `guided_json`, `guided_regex`, `guided_choice` and `experts` go beyond OpenAI's API; the names are vLLM's where it
    has them."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Several[str] | None = None
    stop_token_ids: Annotated[Several[int], Field(max_length=MOST_STOPS)] | None = None
    logit_bias: dict[str, Any] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    ignore_eos: bool = False
    prompt_logprobs: Logprobs | None = None
    experts: bool = False
    """Tell, token by token, which experts computed it and whether it had been guessed."""
    user: str | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Several[str] | None = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    use_beam_search: Any = None
    truncate_prompt_tokens: Any = None
    web_search_options: Any = None
    moderation: Any = None

    def check_supported(self) -> None:
        """Raises `APIError` 400 where a field asks for what is not there; what such fields have by default asks for nothing."""
        for name in UNSUPPORTED:
            if getattr(self, name) not in (None, False, []):
                raise bad(f"{name} is not supported: leave it away" + UNSUPPORTED[name], name)


class CompletionBody(SamplingBody):
    """`/v1/completions`."""

    prompt: str | Several[str] | TokenIds | Several[TokenIds] = ""
    echo: bool = False
    logprobs: Logprobs | None = None
    best_of: int | None = None
    suffix: str | None = None
    response_format: dict[str, Any] | None = None


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Several[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: Several[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    function_call: Any = None


class Function(Body):
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class ChatBody(SamplingBody):
    """`/v1/chat/completions`."""

    messages: Annotated[Several[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tools: Several[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The last message is the beginning of the answer (vLLM's name for it)."""
    functions: Several[Any] | None = None
    modalities: Several[str] | None = None


class EmbeddingBody(Body):
    """`/v1/embeddings`."""

    input: str | Several[str] | TokenIds | Several[TokenIds]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    """None: float."""
    dimensions: int | None = None
    user: str | None = None


class TokenizeBody(Body):
    """`/tokenize`: a text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Several[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """`/detokenize`."""

    model: str | None = None
    tokens: Several[int]
