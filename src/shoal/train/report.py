"""The report of a run: pictures, and one self-contained page."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig, UserError
from ..config.recipes import read_toml
from .history import Metrics, read_metrics
from .plots import draw_plots
from .units import si, spelled


@dataclass
class Card:
    """A headline figure."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass
class Bar:
    """A bar of the comparison; `share` of the longest one, 0 to 1."""

    label: str
    value: float
    share: float


def write_report(run: Path) -> Path:
    """Write `report/*.png` and `report.html` into the run folder; the page's path.

    Reads `metrics.jsonl` and, where they are there, `summary.json` and `config.toml`, so that it also works on a run that
    still goes on or was killed. Raises `UserError` when there are no steps to show or matplotlib is missing.
    """
    from jinja2 import Environment

    metrics = read_metrics(run / "metrics.jsonl")
    if not metrics.steps:
        raise UserError(f"{run / 'metrics.jsonl'} has no training step yet: write the report once the run has made some")
    summary = _read_summary(run / "summary.json", metrics)
    config = _read_text(run / "config.toml")
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    plots = draw_plots(metrics, folder, _layer_names(config, metrics), summary.get("val_bpb"), summary.get("xz_bpb"))

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _read_text(Path(__file__).with_name("report.html.jinja"))
    )
    page = template.render(
        name=run.resolve().name,
        cards=_cards(summary),
        bars=_bars(summary),
        pictures=[(plot, base64.b64encode(plot.path.read_bytes()).decode()) for plot in plots],
        samples=summary.get("samples") or [],
        config=config,
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _read_summary(path: Path, metrics: Metrics) -> dict[str, Any]:
    """The run's summary; for a run without one, what its rows tell."""
    last = metrics.steps[-1]
    rows = {name: last.get(name) for name in ("tokens", "seconds", "max_vio")} | {"train_flops": last.get("flops")}
    for name in ("tokens_per_second", "peak_share"):
        values = metrics.column(name)
        rows[name] = float(np.nanmedian(values)) if np.isfinite(values).any() else None
    if metrics.evaluations:
        rows["val_bpb"] = metrics.evaluations[-1]["val_bpb"]
    return rows | json.loads(_read_text(path) or "{}")


def _read_text(path: Path) -> str:
    """The text of a file, empty where there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _layer_names(config: str, metrics: Metrics) -> list[str]:
    """A name for each MoE layer of the metrics: its number in the model, as in the names of the parameters."""
    # MTP layers may run in a part of the steps only.
    count = max((len(row.get("max_vio_layers") or row.get("expert_load") or []) for row in metrics.steps), default=0)
    try:
        model = ModelConfig(**read_toml(config, "config.toml").get("model", {}))
    except (TypeError, UserError):
        return [f"MoE layer {index + 1}" for index in range(count)]
    depth = model.num_hidden_layers
    names = [f"layer {layer}" for layer in range(depth) if model.is_moe_layer(layer)]
    names += [f"MTP {index + 1}" for index in range(model.num_nextn_predict_layers)]
    return names[:count] if count <= len(names) else [f"MoE layer {index + 1}" for index in range(count)]


def _cards(summary: dict[str, Any]) -> list[Card]:
    """The headline figures that the summary has."""
    get = summary.get
    cards: list[Card] = []
    if get("val_bpb") is not None:
        cards.append(Card("on held-out text", f"{summary['val_bpb']:.3f}", "bits per byte", _against_xz(summary)))
    if get("train_flops") is not None:
        cards.append(_card("training compute", si(summary["train_flops"], "FLOP")))
    if get("tokens") is not None:
        took = f"in {spelled(summary['seconds'])}" if get("seconds") is not None else ""
        cards.append(_card("trained on", si(summary["tokens"]), "tokens", took))
    if get("tokens_per_second") is not None:
        peak = f"{100 * summary['peak_share']:.0f}% of the measured matmul peak" if get("peak_share") is not None else ""
        cards.append(_card("throughput", si(summary["tokens_per_second"]), "tokens/s", peak))
    if get("params_total") is not None:
        active = f"{si(summary['params_active'])} active per token" if get("params_active") not in (None, summary["params_total"]) else ""
        cards.append(_card("parameters", si(summary["params_total"]), note=active))
    if get("max_vio") is not None:
        cards.append(Card("MaxVio", f"{summary['max_vio']:.2f}", note="0 is a perfect balance of the experts"))
    return cards


def _card(label: str, value: str, unit: str = "", note: str = "") -> Card:
    """A card whose value "4.92 M" shows its prefix small, with the unit."""
    number, _, prefix = value.partition(" ")
    return Card(label, number, f"{prefix} {unit}".strip(), note)


def _against_xz(summary: dict[str, Any]) -> str:
    if summary.get("xz_bpb") is None:
        return ""
    saved = 1 - summary["val_bpb"] / summary["xz_bpb"]
    return f"{abs(saved):.0%} {'below' if saved >= 0 else 'above'} xz"


def _bars(summary: dict[str, Any]) -> list[Bar]:
    """This model beside xz on the same text; none where one of the two was not measured."""
    val, xz = summary.get("val_bpb"), summary.get("xz_bpb")
    if val is None or xz is None:
        return []
    return [Bar("this model", val, val / max(val, xz)), Bar("xz", xz, xz / max(val, xz))]
