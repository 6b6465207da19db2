"""What a server tells about itself and its model, and the tokenizer as a service."""

from __future__ import annotations

from typing import Any

from .. import __version__
from ..data import Tokenizer
from .dialect import Dialect
from .errors import bad
from .host import Host, State
from .protocol import ChatBody, DetokenizeBody, TokenizeBody
from .sse import JSON


def health(host: Host) -> JSON:
    """200 if requests are served; 503 while the model is loaded, while draining, and after a failure."""
    state = host.state
    return JSON({"status": state.value}, 200 if state is State.READY else 503, None if state is State.READY else {"Retry-After": "2"})


def version() -> JSON:
    return JSON({"version": __version__})


def models(host: Host) -> JSON:
    """The one model, as OpenAI lists several."""
    return JSON({"object": "list", "data": [describe(host)]})


def describe(host: Host) -> dict[str, Any]:
    """`shoal` holds what the page wants to know, from when the model is loaded."""
    known = {"id": host.name, "object": "model", "created": host.created, "owned_by": "shoal"}
    if host.state is not State.READY:
        return known | {"shoal": {"state": host.state.value}}
    config, dialect = host.engine.config, Dialect(host.tokenizer)
    about = {
        "state": host.state.value,
        "chat": dialect.has_chat,
        "thinks": dialect.thinks,
        "thinking_is_optional": dialect.think_is_optional,
        "tools": dialect.calls_tools,
        "moe_layers": sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)),
        "experts": config.n_routed_experts or 0,
        "experts_per_token": config.num_experts_per_tok or 0,
        "mtp": config.num_nextn_predict_layers,
    }
    return known | {"max_model_len": host.context, "shoal": about}


async def tokenize(host: Host, body: TokenizeBody) -> JSON:
    """Ids of a text or a conversation."""
    host.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad("give either prompt or messages", "prompt")
    ids = await host.read(lambda: _ids(host.tokenizer, body))
    host.log_prompt(ids)
    return JSON({"tokens": ids, "count": len(ids), "max_model_len": host.context})


def _ids(tokenizer: Tokenizer, body: TokenizeBody) -> list[int]:
    if body.messages is not None:
        return Dialect(tokenizer).prompt(ChatBody(messages=body.messages))
    return tokenizer.encode(body.prompt or "", bos=body.add_special_tokens)


async def detokenize(host: Host, body: DetokenizeBody) -> JSON:
    """Text of ids."""
    host.check_model(body.model)
    size = host.engine.config.vocab_size
    if any(not 0 <= token < size for token in body.tokens):
        raise bad(f"tokens holds ids that are not in the vocabulary of {size}", "tokens")
    return JSON({"prompt": await host.read(lambda: host.tokenizer.decode(body.tokens, skip_special=False))})
