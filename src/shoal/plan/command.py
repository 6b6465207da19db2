"""`shoal plan`: from options to tables, pictures and one dictionary of figures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from ..config import ModelConfig, OptimizerConfig, UserError
from ..config.recipes import load_recipe
from . import check, report
from .assumptions import Assumptions
from .cost import (
    NUMBER_FORMATS,
    checkpoint_bytes,
    count_parameters,
    flops_per_token,
    kv_bytes_per_token,
    mtp_parameters,
    optimizer_flops,
)
from .expert_load import balance, read_expert_load
from .hardware import MACHINES, Machine, load_machine
from .layout import Layout, unfilled_node
from .models import BUILT_IN, PUBLISHED
from .options import PlanCommand
from .scaling import scaled
from .search import explain, find_best
from .serving import plan_serving, why_not
from .sources import load_model
from .training import Step, plan_step, usable_memory

Measurements = Callable[[ModelConfig | None, Machine, Assumptions], Iterable[check.Case]]
"""Given the model asked for, the machine and the assumptions: what to predict and how to measure it."""

PUBLISHED_LAYOUTS = {
    "deepseek-v3": (
        "h800",
        Layout(
            devices=2048,
            pipeline=16,
            expert=64,
            schedule="dualpipe",
            recompute="selective",
            precision="fp8",
            moment_bytes=2,
        ),
        15360,
    )
}
"""Machine, layout and batch that a model was trained with (V3 report, 2412.19437, sections 3.2 to 3.3 and 4.2)."""


_USUAL_LENGTH = 4096
"""Tokens of a sequence, where a plan is not told otherwise."""
_FOR_A_MACHINE = (
    "devices",
    "nodes",
    "tokens",
    "flat",
    "serve_batch",
    "context",
    "cache",
    "intra_node_gb_s",
    "inter_node_gb_s",
    "price_per_hour",
)
"""What says nothing without a machine."""
_LAYOUT_OPTIONS = ("pipeline", "expert", "schedule", "chunks", "micro_batch", "recompute", "zero", "precision", "optimizer", "moment_bytes")


def run(command: PlanCommand, measurements: Measurements | None = None) -> dict[str, Any]:
    """Make the plan, show it, and return its figures.

    `measurements` gives --check its measured values; it comes from the command line, because trainer and engine stand above
    this package. Raises `UserError` where the plan cannot work.
    """
    command.validate()
    if command.check and not command.here:
        raise UserError("--check compares with this machine: add --here")
    if command.model is None and not command.here:
        raise UserError(f"no model given: name a config.json, a folder with one, or one of {', '.join(BUILT_IN)}; or ask for --here")
    model = load_model(command.model) if command.model is not None else None
    machine = _machine(command)
    tables: list[report.Table] = []
    figures: dict[str, Any] = {"model": command.model}
    if model is not None:
        _cost(command.model, model, _length(command, "sequence_length", model), tables, figures)
    if machine is not None:
        _on_machine(command, model, machine, tables, figures)
    if command.expert_load is not None:
        _place_experts(command, command.expert_load, model, machine, tables, figures)
    if command.check:
        _check(command, model, machine, measurements, tables, figures)

    if command.markdown == "-":
        print(report.markdown(tables), end="")
    else:
        report.show(tables)
        if command.markdown:
            _write(command.markdown, report.markdown(tables))
    return figures


def _length(command: PlanCommand, option: Literal["sequence_length", "context"], model: ModelConfig) -> int:
    """Tokens of a sequence. Raises `UserError` beyond what the model sees."""
    asked, most = getattr(command, option), model.max_position_embeddings
    if asked is not None and asked > most:
        raise UserError(f"--{option.replace('_', '-')} is {asked}: the model sees {most} tokens (max_position_embeddings), ask for no more")
    return asked or min(_USUAL_LENGTH, most)


def _machine(command: PlanCommand) -> Machine | None:
    """The machine to plan for, with its overrides; None where only the model's own cost is asked for."""
    named = command.machine
    if command.here:
        if named:
            raise UserError(f"--here measures this machine, --machine {named} names another: give one of them")
        from .measure import measure_machine

        machine = measure_machine()
    else:
        if command.published:
            named = named or _published(command)[0]
        if named is None and (_wants_training(command) or command.serve):
            raise UserError(f"no machine given: use --machine with one of {', '.join(MACHINES)} or a TOML file, or --here")
        idle = [name for name in _FOR_A_MACHINE if getattr(command, name) != getattr(PlanCommand, name)]
        if named is None and idle and command.expert_load is None:
            raise UserError(f"--{idle[0].replace('_', '-')} needs a machine: add --machine or --here")
        if named is None:
            return None
        machine = load_machine(named)
    links = {
        "intra_node_gb_s": command.intra_node_gb_s,
        "inter_node_gb_s": command.inter_node_gb_s,
        "price_per_hour": command.price_per_hour,
    }
    return replace(machine, **{name: value for name, value in links.items() if value is not None})  # type: ignore[arg-type]


def _published(command: PlanCommand) -> tuple[str, Layout, int]:
    name = (command.model or "").lower()
    if name not in PUBLISHED_LAYOUTS:
        raise UserError(f"no published layout is known for {command.model}: --published works with {', '.join(PUBLISHED_LAYOUTS)}")
    return PUBLISHED_LAYOUTS[name]


def _wants_training(command: PlanCommand) -> bool:
    asked = (command.train, command.published, command.search, command.timeline, command.chart, command.batch)
    return any(asked) or bool(_given(command))


def _cost(name: str | None, model: ModelConfig, sequence_length: int, tables: list[report.Table], figures: dict[str, Any]) -> None:
    """Parameters, FLOPs and bytes of the model itself."""
    parameters = count_parameters(model)
    training = flops_per_token(model, sequence_length, training=True)
    inference = flops_per_token(model, sequence_length, training=False)
    tables += [
        report.parameter_table(parameters, model),
        report.flops_table(training, inference, model, sequence_length),
        report.bytes_table(model),
    ]
    if published := PUBLISHED.get((name or "").lower()):
        tables.append(report.published_table(model, published))
    figures.update(
        params_total=parameters.total,
        params_active=parameters.active,
        params_mtp=parameters.mtp,
        params_mtp_by_part={name.replace(" ", "_"): value for name, value in mtp_parameters(model).items()},
        params_by_part={name: value for name, value in asdict(parameters).items() if name != "active"},
        sequence_length=sequence_length,
        train_flops_per_token=training.main,
        train_flops_per_token_with_mtp=training.total,
        train_flops_by_part=asdict(training),
        inference_flops_per_token=inference.total,
        newton_schulz_flops_per_step=optimizer_flops(model, OptimizerConfig()),
        kv_bytes_per_token=kv_bytes_per_token(model),
        kv_bytes_per_token_fp8=kv_bytes_per_token(model, "fp8"),
        checkpoint_bytes={name: checkpoint_bytes(model, numbers) for name, numbers in NUMBER_FORMATS.items()},
    )


def _on_machine(
    command: PlanCommand, model: ModelConfig | None, machine: Machine, tables: list[report.Table], figures: dict[str, Any]
) -> None:
    tables.append(report.machine_table(machine))
    if machine.sustained:
        tables.append(report.sustained_table(machine.sustained))
    figures["machine"] = asdict(machine)
    figures["assumptions"] = asdict(command.assume)
    if model is None:
        _what_fits(command, machine, tables, figures)
        _what_trains(command, machine, tables, figures)
    else:
        if _wants_training(command) or not command.serve:
            _training(command, model, machine, tables, figures)
        if command.serve or not _wants_training(command):
            _serving(command, model, machine, tables, figures)
    tables.append(report.assumption_table(command.assume))


def _training(command: PlanCommand, model: ModelConfig, machine: Machine, tables: list[report.Table], figures: dict[str, Any]) -> None:
    layout, batch = _layout(command, machine)
    length = _length(command, "sequence_length", model)
    if command.search:
        step = find_best(model, machine, layout, batch, length, command.assume, fixed=_given(command))
    else:
        wrong = explain(model, machine, layout, batch, length, command.assume)
        if wrong and not _wants_training(command):  # a machine was named, training was not: say so and go on to serving
            tables.append(report.Table("Training", ("",), [(wrong,)]))
            figures["training"] = {"impossible": wrong}
            return
        if wrong:
            raise UserError(wrong)
        step = plan_step(model, machine, layout, batch, length, command.assume)
    usable = usable_memory(machine, command.assume)
    tables += [report.training_table(step, machine, command.tokens), report.memory_table(step, usable)]
    if model.uses_mla and model.n_routed_experts and step.layout.expert > 1:
        tables.append(report.communication_table(model, step.layout.expert, machine, command.assume.link_efficiency))
    figures["training"] = _step_figures(step, machine, command.tokens)
    if command.timeline or command.chart:
        from . import charts

        if command.timeline:
            charts.draw_timeline(step.timeline, command.timeline)
        if command.chart:
            charts.draw_plan(step, usable, machine.price_per_hour, command.tokens, command.chart)


def _layout(command: PlanCommand, machine: Machine) -> tuple[Layout, int]:
    """Layout and batch asked for: the published one or a single device, and the options over it."""
    layout, batch = Layout(precision=_fastest(machine)), 0
    if command.published:
        _, layout, batch = _published(command)
    if command.devices is not None and command.nodes is not None:
        raise UserError("--devices and --nodes contradict each other: give one of them")
    devices = command.devices if command.nodes is None else command.nodes * machine.devices_per_node
    changes = {option: getattr(command, option) for option in _given(command)}
    if devices is not None:
        changes["devices"] = devices
    if command.flat:
        changes["two_hop"] = False
    layout = replace(layout, **changes)
    return layout, command.batch or batch or 8 * max(layout.devices, 1) * layout.micro_batch


def _given(command: PlanCommand) -> list[str]:
    """Fields of a layout that were asked for."""
    return [option for option in _LAYOUT_OPTIONS if getattr(command, option) is not None]


def _fastest(machine: Machine) -> Literal["bf16", "fp32"]:
    return "bf16" if machine.peak("bf16") >= machine.peak("fp32") else "fp32"


def _step_figures(step: Step, machine: Machine, tokens: float) -> dict[str, Any]:
    hours = step.device_hours(tokens)
    return {
        "layout": asdict(step.layout),
        "batch": step.batch,
        "step_seconds": step.seconds,
        "computing_seconds": step.computing,
        "exposed_communication_seconds": step.exposed,
        "bubble_seconds": step.bubble,
        "gradient_exchange_seconds": step.gradient_exchange,
        "optimizer_seconds": step.optimizer,
        "tokens_per_second": step.tokens_per_second,
        "flops_per_second_per_device": step.flops_per_device,
        "tokens": tokens,
        "device_hours": hours,
        "cost": hours * machine.price_per_hour,
        "memory_bytes": {**asdict(step.memory), "total": step.memory.total},
    }


def _serving(command: PlanCommand, model: ModelConfig, machine: Machine, tables: list[report.Table], figures: dict[str, Any]) -> None:
    devices = command.devices or (command.nodes or 0) * machine.devices_per_node or 1
    context = _length(command, "context", model)
    plans = [
        plan_serving(model, machine, weights, devices, context, command.cache, command.serve_batch, command.assume)
        for weights in ("bf16", "fp8", "int8", "int4")
        if weights != "fp8" or machine.fp8_tflops
    ]
    if command.serve and not any(plan.fits for plan in plans):
        raise UserError(why_not(plans[-1], model, machine, command.cache, command.assume) or "")
    tables.append(report.serving_table(plans, machine, command.cache))
    figures["serving"] = [{**asdict(plan), "fits": plan.fits} for plan in plans]


def _what_fits(command: PlanCommand, machine: Machine, tables: list[report.Table], figures: dict[str, Any]) -> None:
    """Every built-in model in the largest number format that fits."""
    rows, best = [], {}
    context = command.context or _USUAL_LENGTH
    for name, model in BUILT_IN.items():
        if context > model.max_position_embeddings:
            rows.append((name, f"sees {model.max_position_embeddings} tokens", "-", "-", "-"))
            continue
        for weights in ("bf16", "int8", "int4"):
            plan = plan_serving(model, machine, weights, 1, context, command.cache, command.serve_batch, command.assume)
            if plan.fits:
                rows.append((name, weights, report.size(plan.weight_bytes), f"{plan.batch_1_tokens_per_second:.2f}", f"{plan.sequences:,}"))
                best[name] = {**asdict(plan), "fits": True}
                break
        else:
            rows.append((name, "does not fit", report.size(plan.weight_bytes) + " in int4", "-", "-"))
    columns = ("model", "weights", "size", "decode tok/s, one sequence", f"sequences of {context}")
    tables.append(report.Table("What this machine can serve (roofline)", columns, rows))
    figures["fits"] = best


def _what_trains(command: PlanCommand, machine: Machine, tables: list[report.Table], figures: dict[str, Any]) -> None:
    """The demo recipe and larger models of its kind: speed, memory, and how long a compute-optimal run takes."""
    recipe, rows, usable = load_recipe("demo"), [], usable_memory(machine, command.assume)
    precision = machine.sustained.precision if machine.sustained else _fastest(machine)
    figures["trains"] = []
    for factor in (1, 4, 16, 64, 256):
        shape = scaled(recipe.model, factor)
        batch, length = recipe.batch_size, recipe.sequence_length
        seen = check.predict_training(shape, machine, batch, length, precision=precision, assumptions=command.assume)
        parameters, fits = count_parameters(shape), seen.memory_bytes <= usable
        hours = 20 * parameters.total / seen.tokens_per_second / 3600
        figures["trains"].append({"params_total": parameters.total, **asdict(seen), "fits": fits, "hours_20_tokens_per_parameter": hours})
        name = "demo" if factor == 1 else f"demo x {factor}"
        speed, memory = f"{seen.tokens_per_second:,.0f}" if fits else "does not fit", report.size(seen.memory_bytes)
        long = f"{hours:,.1f} hours" if hours < 48 else f"{hours / 24:,.0f} days"
        rows.append((name, report.count(parameters.total), speed, memory, long if fits else "-"))
    columns = ("model", "parameters", "tok/s", "memory", "20 tokens a parameter")
    note = (
        f"the demo recipe ({recipe.batch_size} x {recipe.sequence_length} tokens a step, Muon, {precision}) and larger models of its kind"
    )
    tables.append(report.Table("What this machine can train", columns, rows, note))


def _place_experts(
    command: PlanCommand, file: str, model: ModelConfig | None, machine: Machine | None, tables: list[report.Table], figures: dict[str, Any]
) -> None:
    """What redundant experts and their places do for the load in `file`."""
    if model is None or not (model.uses_mla and model.n_routed_experts):
        raise UserError("--expert-load is for models with experts: name one")
    if command.nodes is not None and machine is None:
        raise UserError("--nodes counts nodes of a machine: name it with --machine, or give --devices")
    per_node = machine.devices_per_node if machine else command.devices or 1
    devices = command.devices or (command.nodes or 1) * per_node
    unfilled = machine and unfilled_node(machine, devices)
    if unfilled:
        raise UserError(unfilled)
    nodes = -(-devices // per_node)
    load = read_expert_load(file, model.n_routed_experts)
    placed = balance(model, load, devices, nodes, command.redundant_experts)
    tables.append(report.placement_table(placed, model))
    figures["expert_placement"] = {**asdict(placed), "placements": [placement.experts for placement in placed.placements]}


def _check(
    command: PlanCommand,
    model: ModelConfig | None,
    machine: Machine | None,
    measurements: Measurements | None,
    tables: list[report.Table],
    figures: dict[str, Any],
) -> None:
    if measurements is None or machine is None:
        raise UserError("--check needs measurements by the trainer, and this call of plan was given none")
    rows = check.compare(measurements(model, machine, command.assume), tell=lambda text: print(text, file=sys.stderr, flush=True))
    from .measure import product_tflops

    tables.append(report.check_table(rows, machine.fp32_tflops, product_tflops()))
    figures["check"] = [{**asdict(row), "error": row.error, "ok": row.ok} for row in rows]


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another file") from None
