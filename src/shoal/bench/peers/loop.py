"""The loop of a side's process: one JSON request a line on standard input, one JSON line on standard output for each.

Standard library only: a side may run under another Python than Shoal's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(operations: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer requests `{"op": NAME, **arguments}` until standard input ends; a failure is answered with `{"error": text}`."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not come between the replies
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = operations[request.pop("op")](**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
