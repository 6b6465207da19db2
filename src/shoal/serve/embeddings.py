"""`/v1/embeddings`: the mean hidden state of a text."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from ..config import SamplingOptions
from ..engine import Request
from .completions import prompts_of
from .errors import bad, too_long
from .host import Host
from .protocol import EmbeddingBody
from .reader import AnswerReader
from .sse import JSON, unless_gone
from .turn import Turn


async def create(host: Host, body: EmbeddingBody, http: HTTPRequest) -> Response:
    """Embed one or several texts."""
    began = time.perf_counter()
    host.check_model(body.model)
    size = host.engine.config.hidden_size
    if body.dimensions not in (None, size):
        raise bad(f"the embeddings of this model have {size} dimensions", "dimensions")
    prompts = await unless_gone(http, host.read(lambda: prompts_of(body.input, host.tokenizer)))
    for prompt in prompts:
        if len(prompt) > host.context:
            raise too_long(f"the text has {len(prompt)} tokens, the model sees {host.context}: shorten it", "input")
    requests = [Request(prompt, SamplingOptions(max_tokens=0), embed=True) for prompt in prompts]
    turn = Turn(host, requests, [AnswerReader() for _ in requests], began, 1)
    await unless_gone(http, turn.answers())
    data = []
    for index, report in enumerate(turn.reports):
        assert report is not None
        assert report.embedding is not None
        data.append({"object": "embedding", "index": index, "embedding": _written(report.embedding, body.encoding_format)})
    tokens = sum(map(len, prompts))
    return JSON({"object": "list", "data": data, "model": host.name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


def _written(vector: np.ndarray, form: str | None) -> Any:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.astype(float).tolist()
