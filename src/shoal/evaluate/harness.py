"""Shoal's engine as a model of lm-evaluation-harness.

`python -m shoal.evaluate.harness --model shoal --model_args path=MODEL --tasks hellaswag` is `lm_eval` with this model registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..config import EngineOptions, MachineOptions, SamplingOptions, UserError
from ..engine import Engine, Request, load


class Instance(Protocol):
    """What the harness asks: `args` depends on the kind of request."""

    args: tuple[Any, ...]


class HarnessModel:
    """The three kinds of request of the harness (its `LM` class), answered by the engine."""

    def __init__(self, path: str, device: str = "auto", precision: str = "auto", threads: int = 0, max_running: int = 64) -> None:
        loaded = load(path, MachineOptions(device, precision, int(threads)))  # type: ignore[arg-type]
        options = EngineOptions(max_running=int(max_running), step_tokens=max(512, 4 * int(max_running)))
        self.tokenizer, self.engine = loaded.tokenizer, Engine(loaded.runner, loaded.tokenizer, options)

    def loglikelihood(self, requests: Sequence[Instance], **_: Any) -> list[tuple[float, bool]]:
        """Of `(context, continuation)`: log-probability of the continuation, and whether greedy decoding would write it."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            # Space between the two belongs to the continuation: that is how text is tokenized.
            kept = context.rstrip()
            start = self._start(kept)
            pairs.append((start, self._encode_after(kept, context[len(kept) :] + continuation)))
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Instance], **_: Any) -> list[float]:
        """Of `(text,)`: its log-probability; beyond the model's context each window begins anew, half of it read before."""
        totals = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0])
            window = self.engine.context
            pieces, at = [], 0
            while at < len(ids):
                read = 0 if at == 0 else window // 2
                head = [self.tokenizer.first_id] if at == 0 else []
                end = min(at + window - read - len(head), len(ids))
                pieces.append(([*head, *ids[at - read : at]], ids[at:end]))
                at = end
            totals.append(sum(logprob for logprob, _ in self._score(pieces)))
        return totals

    def generate_until(self, requests: Sequence[Instance], **_: Any) -> list[str]:
        """Of `(context, options)`: the text up to the first of `options["until"]`.

        A long context loses its beginning to make room for `options["max_gen_toks"]`, though not for more than half of what the model sees.
        """
        asked = []
        for number, request in enumerate(requests):
            context, options = request.args
            until = options.get("until", ())
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample", False) else 0.0
            sampling = SamplingOptions(
                max_tokens=int(options.get("max_gen_toks", 256)),
                temperature=temperature,
                top_p=float(options.get("top_p", 1.0)),
                stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
                seed=number,  # samples of one prompt are to differ
            )
            room = max(self.engine.context - sampling.max_tokens, self.engine.context // 2)
            asked.append(Request(self._start(context)[-room:], sampling))
        return [result.text for result in self.engine.run(asked)]

    def _start(self, context: str) -> list[int]:
        return self.tokenizer.encode(context, bos=True) or [self.tokenizer.first_id]

    def _encode_after(self, context: str, text: str) -> list[int]:
        """Tokens of `text` as it goes on from `context`."""
        before, whole = self.tokenizer.encode(context), self.tokenizer.encode(context + text)
        return whole[len(before) :] if whole[: len(before)] == before else self.tokenizer.encode(text, behind=before)

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        sampling = SamplingOptions(max_tokens=0, prompt_logprobs=1)
        cut = [(context[-max(1, self.engine.context - len(text)) :], text[-(self.engine.context - 1) :]) for context, text in pairs]
        results = self.engine.run([Request([*context, *text], sampling) for context, text in cut])
        scored = []
        for (_, text), result in zip(cut, results, strict=True):
            assert result.prompt.logprobs is not None
            tokens = result.prompt.logprobs[len(result.prompt.logprobs) - len(text) :]
            scored.append((sum(token.logprob or 0.0 for token in tokens), all(token.id == token.top[0][0] for token in tokens)))
        return scored


def register() -> None:
    """Make `shoal` known to lm-evaluation-harness. Raises `UserError` where that is not installed."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise UserError("lm-evaluation-harness is not installed: pip install lm-eval") from None

    @register_model("shoal")
    class ShoalLM(HarnessModel, LM):
        """See `HarnessModel`."""

        def __init__(self, path: str, **options: Any) -> None:
            LM.__init__(self)
            known = ("device", "precision", "threads", "max_running")
            HarnessModel.__init__(self, path, **{name: value for name, value in options.items() if name in known and value is not None})


def main() -> None:
    """`lm_eval`'s own command line."""
    register()

    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
