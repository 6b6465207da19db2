"""`shoal bench fp8`: what training in FP8 does to the loss, beside BF16 on the same data in the same order, and a known mistake."""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from ..apart import run_apart
from ..config import BenchFP8Command, FP8Config, ModelConfig, OptimizerConfig, TrainConfig
from ..config.recipes import load_recipe, write_toml
from ..train.metrics import read_rows
from .pictures import new_figure, require_picture, save

SMOOTHED = 0.15
"""Share of a run's steps, its last ones, over which the loss is averaged."""

WINDOW = 25
"""Steps whose mean is drawn."""

SUMMED = (128, 256, 512, 1024, 2048, 4096, 8192)
SIDE = 256
"""Rows of both operands whose product is examined."""

SHAPE = ModelConfig(
    vocab_size=2048, hidden_size=160, num_hidden_layers=2, intermediate_size=384, num_attention_heads=4, max_position_embeddings=512,
    kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=96, init="fan_in", zero_init_output=True,
)  # fmt: skip
"""Widths of several tiles, as far as a CPU allows."""


def variants(command: BenchFP8Command, recipe: TrainConfig) -> dict[str, TrainConfig]:
    """The runs of one seed by name; the first is what the others are compared with."""
    moments = replace(recipe.optimizer, moments="bf16")
    quantized = replace(recipe, precision="fp8", optimizer=moments)
    return {
        command.baseline: replace(recipe, precision=command.baseline),
        "fp8": quantized,
        "fp8, gradients in 128x128": replace(quantized, fp8=FP8Config(gradient_tiles="128x128")),
    }


def recipe_of(command: BenchFP8Command) -> TrainConfig:
    """What all runs share but seed and precision."""
    demo = load_recipe("demo")
    optimizer: OptimizerConfig = demo.optimizer
    return replace(
        demo, minutes=None, steps=command.steps, data=command.data, batch_size=command.batch_size, sequence_length=128, model=SHAPE,
        optimizer=optimizer, prompts=(), eval_every_minutes=0, eval_tokens=512, threads=command.threads,
        checkpoint=replace(demo.checkpoint, every_minutes=0, keep_last=1),
    )  # fmt: skip


def product_errors() -> list[dict[str, float]]:
    """Of products over K random numbers, as shares of the exact product (Frobenius): of quantizing and adding, and of adding alone."""
    import torch

    from ..numerics import fp8

    draw = torch.Generator().manual_seed(0)
    rows = []
    for columns in SUMMED:
        x, weight = (torch.randn(SIDE, columns, generator=draw) for _ in range(2))
        row: dict[str, float] = {"k": columns}
        exact = x.double() @ weight.double().T
        for name, power in (("fp32_scales", False), ("power_of_two_scales", True)):
            tiles, blocks = fp8.quantize_tiles(x, power_of_two=power), fp8.quantize_blocks(weight, power_of_two=power)
            found = fp8.product(tiles, blocks).double()
            operands = fp8.dequantize_tiles(tiles).double(), fp8.dequantize_blocks(blocks.data, blocks.scales).double()
            row[name] = float((found - exact).norm() / exact.norm())
            row[f"{name}_sums"] = float((found - operands[0] @ operands[1].T).norm() / exact.norm())
        rows.append(row)
    return rows


def run_bench(command: BenchFP8Command) -> dict[str, Any]:
    """Train every variant with every seed, one after the other, print the table, return the JSON object."""
    command.validate()
    picture = Path(command.picture) if command.picture and command.seeds else None
    if picture is not None:
        require_picture(picture)
    errors = product_errors()
    _print_errors(errors)
    if not command.seeds:
        return {"product_errors": errors}
    recipe = recipe_of(command)
    losses: dict[str, list[list[float]]] = {}
    for seed in range(command.seeds):
        for name, settings in variants(command, recipe).items():
            run = losses.setdefault(name, [])
            run.append(train(replace(settings, seed=seed)))
            print(f"seed {seed}, {name}: {smoothed(run[-1]):.4f} nats a token", file=sys.stderr, flush=True)
    result = compare(losses) | {"product_errors": errors}
    _print(result)
    if picture is not None:
        draw(losses, picture)
    return result


def train(settings: TrainConfig) -> list[float]:
    """`shoal train` in a process of its own: the loss of every step; NaN where it was not finite."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_toml(replace(settings, out=str(Path(folder) / "run")), Path(folder) / "settings.toml")
        run_apart("shoal", "train", path, failed="a run did not get to its end")
        rows = read_rows(Path(folder) / "run" / "metrics.jsonl")
        return [math.nan if row["loss"] is None else row["loss"] for row in rows if "loss" in row]


def smoothed(losses: list[float]) -> float:
    """Mean of the last steps; infinite where a run has diverged."""
    last = losses[-max(1, round(SMOOTHED * len(losses))) :]
    return mean(last) if all(map(math.isfinite, last)) else math.inf


def compare(losses: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Final losses by variant and seed, and how far they are from those of the first variant with the same seed (NaN: that diverged)."""
    final = {name: [smoothed(run) for run in runs] for name, runs in losses.items()}
    baseline = next(iter(final))
    relative = {
        name: [x / b - 1 if math.isfinite(b) else math.nan for x, b in zip(found, final[baseline], strict=True)]
        for name, found in final.items()
    }
    return {
        "baseline": baseline,
        "final_loss": final,
        "relative_difference": {name: found for name, found in relative.items() if name != baseline},
        "mean_relative_difference": {name: mean(found) for name, found in relative.items() if name != baseline},
    }


def _print_errors(rows: list[dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="error of an FP8 product over K columns, as a share of the exact one")
    for column in ("K", "fp32 scales", "of that, sums", "scales 2^n", "of that, sums"):
        table.add_column(column, justify="right")
    for row in rows:
        k, *errors = row.values()
        table.add_row(f"{k:.0f}", *(f"{error:.2%}" if error > 1e-4 else f"{error:.1e}" for error in errors))
    Console(width=110, highlight=False).print(table)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"loss at the end (mean of the last {SMOOTHED:.0%} of the steps), same data in the same order")
    table.add_column("")
    for seed in range(len(result["final_loss"][result["baseline"]])):
        table.add_column(f"seed {seed}", justify="right")
    table.add_column("difference", justify="right")
    for name, found in result["final_loss"].items():
        difference = result["mean_relative_difference"].get(name)
        table.add_row(name, *(f"{loss:.4f}" for loss in found), "" if difference is None else f"{difference:+.2%}")
    Console(width=110, highlight=False).print(table)


def draw(losses: dict[str, list[list[float]]], path: Path) -> None:
    """Differences from the first variant over the steps, smoothed, one thin line a seed and their mean."""
    baseline, *others = losses
    figure = new_figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    for colour, (name, runs) in zip(("0.35", "tab:blue", "tab:red"), losses.items(), strict=True):
        average = [mean(step) for step in zip(*runs, strict=True)]
        left.plot(_moving(average), color=colour, label=name, linewidth=1.2)
        if name in others:
            gaps = [[100 * (x / b - 1) for x, b in zip(run, base, strict=True)] for run, base in zip(runs, losses[baseline], strict=True)]
            for gap in gaps:
                right.plot(_moving(gap), color=colour, alpha=0.3, linewidth=0.8)
            right.plot(_moving([mean(step) for step in zip(*gaps, strict=True)]), color=colour, label=name)
    left.set(xlabel="step", ylabel="nats per token", yscale="log")
    right.axhspan(-0.25, 0.25, color="0.9")
    right.set(xlabel="step", ylabel=f"loss against {baseline}, %", ylim=(-1.5, 3))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _moving(values: list[float]) -> list[float]:
    """Mean over the last steps."""
    return [mean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]
