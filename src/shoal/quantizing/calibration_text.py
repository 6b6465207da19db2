"""Text for calibration, as token ids."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import UserError
from ..data import Corpus, Tokenizer

SPREAD = 8
"""So many times the tokens that are wanted are looked through, so that they come from many documents."""
LEAST_TOKENS = 128


def calibration_ids(corpus: Corpus, tokenizer: Tokenizer, tokens: int, length: int) -> Tensor:
    """`[S, T]`: about `tokens` tokens of the corpus' training documents, laid end to end and cut; T is `length` or all there is.

    Raises `UserError` where there is too little text to learn anything from.
    """
    found: list[int] = []
    for text in corpus.train_documents():
        found += tokenizer.document(text)
        if len(found) >= SPREAD * tokens:
            break
    if len(found) < LEAST_TOKENS:
        raise UserError(f"{corpus.name} holds {len(found)} tokens to calibrate with: give at least {LEAST_TOKENS}")
    length = min(length, len(found))
    sequences = torch.tensor(found[: len(found) // length * length]).view(-1, length)
    wanted = max(1, tokens // length)
    return sequences[torch.linspace(0, len(sequences) - 1, min(wanted, len(sequences))).round().long()]
