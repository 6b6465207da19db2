"""Generation of one text, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..config import SamplingOptions, UserError
from ..data import Tokenizer
from ..model import Transformer
from ..runtime import Machine, inference
from .cache import DenseCache


def generate(model: Transformer, machine: Machine, prompt: list[int], sampling: SamplingOptions, stop: set[int]) -> Iterator[int]:
    """Yield the ids that continue `prompt`, ending after a token of `stop` (which is yielded) or `max_tokens`.

    The context ends at `max_position_embeddings`: a prompt that fills it is refused.
    """
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model sees {model.config.max_position_embeddings}: shorten it")
    count = min(sampling.max_tokens, room)
    caches = [DenseCache(model.config, 1, len(prompt) + count, machine.device) for _ in model.blocks]
    generator = torch.Generator(device="cpu")
    if sampling.seed is not None:
        generator.manual_seed(sampling.seed)
    else:
        generator.seed()
    model.eval()
    new, seen = prompt, 0
    for _ in range(count):
        with inference(machine):
            ids = torch.tensor([new], device=machine.device)
            positions = torch.arange(seen, seen + len(new), device=machine.device)[None]
            logits = model.logits(model(ids, positions, caches).hidden[0, -1])
        token = sample(logits, sampling.temperature, generator)
        seen += len(new)
        new = [token]
        yield token
        if token in stop:
            return


def sample(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """One token id from `logits [V]`; temperature 0 takes the largest."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.float().cpu() / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


class TextStream:
    """Turns ids into text piece by piece, holding back bytes that do not yet make a whole character.

    The pieces together are what the tokenizer makes of all ids at once. Some tokenizers decode a token differently at
    the beginning of a text (they drop its space), so the tokens of the last piece are decoded again with what follows.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        """Tokens of the last piece."""
        self._open: list[int] = []
        """Tokens since then."""

    def push(self, token: int) -> str:
        """Text that `token` completes; empty while a character is still open."""
        self._open.append(token)
        piece = self._undecided()
        # A replacement character at the end may be the beginning of a character.
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._shown, self._open = self._open, []
        return piece

    def finish(self) -> str:
        """What is still held back, at the end."""
        piece = self._undecided()
        self._shown, self._open = [], []
        return piece

    def _undecided(self) -> str:
        """Text of the open tokens."""
        return self._tokenizer.decode(self._shown + self._open)[len(self._tokenizer.decode(self._shown)) :]
