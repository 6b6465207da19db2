"""The figures of a finished run."""

from __future__ import annotations

import lzma
import math
from typing import Any

from ..config import ModelConfig
from ..parallel import Layout
from ..plan.cost import count_parameters
from ..runtime import Machine, peak_memory
from .likelihood import Document, Likelihood
from .metrics import read_rows
from .state import TrainState

MAX_VIO_SHARE = 0.1
"""`max_vio` is the mean over the last tenth of the steps: one batch says little."""


def describe_model(model: ModelConfig, machine: Machine, layout: Layout) -> str:
    """One line for the display."""
    count = count_parameters(model)
    kind = "MLA" if model.uses_mla else "GQA"
    kind += " + MoE" if model.is_moe_layer(model.num_hidden_layers - 1) else " + dense"
    kind += f" + MTP {model.num_nextn_predict_layers}" if model.num_nextn_predict_layers else ""
    where = machine.describe() + (f"; {layout.describe()}" if layout.world > 1 else "")
    return f"{kind}, {count.total / 1e6:.1f}M parameters, {count.active / 1e6:.1f}M active; {where}"


def xz_bits_per_byte(texts: list[str]) -> float:
    """Bits per byte of `xz -9e` on the texts one after the other: what a strong general compressor makes of them."""
    data = "".join(texts).encode("utf-8", "surrogatepass")
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def summarize(state: TrainState, machine: Machine, scored: list[Document], final: Likelihood) -> dict[str, Any]:
    """What `summary.json` holds; keys are stable. `scored` are the held-out documents that `final` is the likelihood of."""
    at, count = state.counters, count_parameters(state.config.model)
    training_seconds = 0.0
    violations: list[float] = []
    for row in read_rows(state.folder.metrics):
        if "loss" in row:
            training_seconds += state.config.tokens_per_step / row["tokens_per_second"]
            if row["step"] > at.step - max(1, round(MAX_VIO_SHARE * at.step)) and "max_vio" in row:
                violations.append(row["max_vio"])
    texts = [state.data.tokenizer.decode(tokens.tolist()) for tokens, _ in scored]
    training_seconds = training_seconds or math.inf  # a run that its budget leaves no time for a step takes none, in no time
    return {
        "val_bpb": final.bits_per_byte,
        "xz_bpb": xz_bits_per_byte(texts),
        "val_loss": final.nats_per_token,
        "val_tokens": final.tokens,
        "val_bytes": final.bytes,
        "tokens": at.tokens,
        "steps": at.step,
        "skipped": at.skipped,
        "train_flops": at.flops,
        "seconds": at.seconds,
        "counting_seconds": at.counting_seconds,
        "tokens_per_second": at.tokens / training_seconds,
        "peak_share": at.flops / training_seconds / (machine.peak_flops * state.team.layout.world),
        "max_vio": sum(violations) / len(violations) if violations else None,
        "params_total": count.total,
        "params_active": count.active,
        "params_mtp": count.mtp,
        "counted_ngrams": 0 if state.model.model.counted is None else len(state.model.model.counted.entries),
        "precision": machine.precision,
        "peak_memory": peak_memory(machine.device),
    }
