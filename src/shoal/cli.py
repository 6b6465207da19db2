"""The verbs. Each parses its options, calls the part of Shoal that does the work, and prints the result."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from . import __version__
from .config import (
    BenchAblationCommand,
    BenchDispatchCommand,
    BenchEfficiencyCommand,
    BenchEngineCommand,
    BenchFP8Command,
    BenchMemoryCommand,
    BenchQuantizationCommand,
    BenchRolloutsCommand,
    BenchServeCommand,
    BenchTrainCommand,
    ChatCommand,
    DoctorCommand,
    DPOCommand,
    EvalCommand,
    ExportCommand,
    GenerateCommand,
    GRPOCommand,
    QuantizeCommand,
    ReasoningCommand,
    ServeCommand,
    SFTCommand,
    TrainConfig,
    UserError,
)
from .finite import finite

if TYPE_CHECKING:
    from .plan.command import Measurements
    from .plan.rules import Rules

T = TypeVar("T")

NEAR = 0.05
"""By so much a model may miss the size that was asked for before that is said."""


def parse(cls: type[T], args: Sequence[str], verb: str, default: T | None = None) -> T:
    """The options of a verb; `UserError` where they are wrong."""
    options: dict[str, Any] = {"args": list(args), "prog": f"shoal {verb}", "description": cls.__doc__}
    if default is not None:
        options["default"] = default
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    # tyro draws a box over several lines; what it says fits on one.
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", complaint.getvalue().split("For full helptext")[0])
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    raise UserError(f"{text}; see shoal {verb} --help")


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The last line on stdout is one JSON object where that was asked for."""
    if as_json:
        print(json.dumps(finite(result), ensure_ascii=False, allow_nan=False))


def train(args: list[str]) -> None:
    """Pretrain a model: shoal train [RECIPE] [--data PATH...] [--minutes 5] ..."""
    from .config.recipes import load_recipe, recipe_names, with_one_budget

    given = list(args)
    derived = _derived(args)
    named = bool(args) and not args[0].startswith("-")
    default = derived or load_recipe(args.pop(0) if named else "default")
    if "--help" in args or "-h" in args:
        print(f"shoal train [RECIPE] [OPTIONS]; RECIPE is a TOML file or one of: {', '.join(recipe_names())}")
        print(
            "shoal train [RULES] --minutes 5 [OPTIONS], or --flops 1e13, or --params 5M: shape, batch, rates and tokens from a budget or\n"
            "about a size; RULES: full (where neither rules nor a recipe are named), exportable (plain deepseek_v3 files) or baseline\n"
        )
    config = parse(TrainConfig, args, "train", default)

    from .parallel import is_member
    from .parallel.launch import ending_with_others
    from .showcase import present
    from .train import find_run
    from .train import train as run

    if config.resume and not named and derived is None:
        default = find_run(config.out).settings(team=config.nproc > 1 or is_member())
        config = parse(TrainConfig, args, "train", default)
    shape = next((arg for arg in given if arg.startswith("--model.")), None)
    if config.start and shape:
        raise UserError(f"{shape.split('=')[0]} has no say over a model that is there already: leave it away, or --start")
    config = with_one_budget(config, default)
    if config.nproc > 1 and "RANK" not in os.environ:
        _start_processes(config, None if derived is not None else given)
        return
    if config.memory_limit and not config.resume and not is_member():
        from .memory_limit import fit

        config = fit(config)
    with ending_with_others():
        trained = run(config)
    if trained.reports:
        finish(present(trained, config), config.json)


def _derived(args: list[str]) -> TrainConfig | None:
    """Settings that rules derive from `--flops`, `--params` or `--minutes`; None where a recipe or a model says what to train.

    The name of the rules, `--flops` and `--params` are taken out of `args`. `--params` with `--minutes` trains its model so long.
    A run that goes on has what rules found for the machine as it was then.
    """
    from .config.recipes import RULES
    from .plan.rules import Rules

    named = bool(args) and not args[0].startswith("-")
    flops, size = _take(args, "--flops"), _take(args, "--params")
    dialled = flops is not None or size is not None
    if _asked(args, "--help", "-h") or (not dialled and _asked(args, "--resume")):
        if named and args[0] in RULES:
            args.pop(0)
        return None
    if not dialled and not (args[0] in RULES if named else _asked(args, "--minutes") and not _asked(args, "--start")):
        return None
    if not named and _asked(args, "--resume"):
        raise UserError("--flops and --params are for new runs, a run that goes on has its shape: give --minutes, --tokens or --steps")
    rules = Rules.load(args.pop(0) if named else "full")
    if flops is not None and size is not None:
        raise UserError("--flops and --params both say how large the model is: give one of them")
    if flops is not None:
        return rules.config(_number("--flops", flops, "1e13"))
    if size is not None:
        return _of_size(rules, size)
    if not _asked(args, "--minutes"):
        raise UserError(f"{rules.name} are rules, which need a budget: give --minutes, --flops or --params")
    if "RANK" in os.environ:
        raise UserError(
            "--minutes measures the machine, and here every process would find another model: give --flops or --params, or --nproc"
        )
    from .runtime import start

    asked = parse(TrainConfig, args, "train", replace(rules.config(1e12), steps=None, minutes=1.0))
    if asked.minutes is None:
        raise UserError("--minutes is None: it must be more than 0")
    asked.validate_budget()
    return rules.config_for_minutes(asked.minutes, start(asked.device, asked.precision, asked.threads).peak_flops)


def _of_size(rules: Rules, size: str) -> TrainConfig:
    """Settings of the model that comes nearest to what `--params` asks for; says so where it is not near. Widths and layers are whole."""
    from .plan.cost import count_parameters
    from .plan.report import count

    asked = _number("--params", size, "5M")
    config = rules.config(rules.flops_for(asked))
    found = count_parameters(config.model).total
    if abs(found / asked - 1) > NEAR and os.environ.get("RANK", "0") == "0":
        print(f"asked for {count(asked)} parameters: the nearest model of the rules {rules.name} has {count(found)}", file=sys.stderr)
    return config


def _number(option: str, text: str, example: str) -> float:
    """A number that may end in K, M or B. Raises `UserError` for what is none."""
    digits, unit = (text[:-1], {"K": 1e3, "M": 1e6, "B": 1e9}[text[-1].upper()]) if text[-1:].upper() in ("K", "M", "B") else (text, 1.0)
    try:
        return float(digits) * unit
    except ValueError:
        raise UserError(f"{option} is {text!r}: it must be a number such as {example}") from None


def _asked(args: list[str], *options: str) -> bool:
    return any(arg.split("=")[0] in options for arg in args)


def _take(args: list[str], option: str) -> str | None:
    """The value of an option, which is taken out; None where it is not given."""
    at = next((i for i, arg in enumerate(args) if arg.split("=")[0] == option), None)
    if at is None:
        return None
    joined = "=" in args[at]
    value = args[at].partition("=")[2] if joined else "".join(args[at + 1 : at + 2])
    del args[at : at + 1 + (not joined)]
    return value


def _start_processes(config: TrainConfig, args: list[str] | None) -> None:
    """Refuse what cannot work, then run `shoal train ARGS`, or for None what `config` says, in `config.nproc` processes."""
    from .config.recipes import to_toml
    from .parallel.launch import launch
    from .parallel.layout import layout_of

    config.validate()
    layout_of(config, config.nproc)
    with tempfile.TemporaryDirectory() as folder:
        if args is None:  # rules measure the machine, and another process would find another model
            settings = Path(folder) / "settings.toml"
            settings.write_text(to_toml(config), encoding="utf-8")
            args = [str(settings)]
        launch(["train", *args], config.nproc)


def generate(args: list[str]) -> None:
    """Continue a prompt"""
    command = parse(GenerateCommand, args, "generate")

    from .engine.command import run_generate

    finish(run_generate(command), command.json)


def chat(args: list[str]) -> None:
    """Talk to a model in the terminal"""
    command = parse(ChatCommand, args, "chat")

    from .serve.terminal import run_chat

    run_chat(command)


def serve(args: list[str]) -> None:
    """Serve a model: OpenAI and Anthropic APIs, and a chat page"""
    command = parse(ServeCommand, args, "serve")
    _wait_asleep()

    from .serve.command import run_serve

    run_serve(command)


def evaluate(args: list[str]) -> None:
    """Bits per byte of text under a model, or the share of problems that it solves"""
    command = parse(EvalCommand, args, "eval")
    command.validate()
    if command.tasks:
        from .evaluate.tasks import run_tasks

        finish(run_tasks(command), command.json)
        return

    from .evaluate import run_eval

    finish(run_eval(command), command.json)


def sft(args: list[str]) -> None:
    """Fine-tune a model on conversations"""
    command = parse(SFTCommand, args, "sft")

    from .post.sft import run_sft

    finish(run_sft(command), command.folder.json)


def dpo(args: list[str]) -> None:
    """Fine-tune a chat model on preferences"""
    command = parse(DPOCommand, args, "dpo")

    from .post.dpo import run_dpo

    finish(run_dpo(command), command.folder.json)


def grpo(args: list[str]) -> None:
    """Improve a chat model by reinforcement"""
    command = parse(GRPOCommand, args, "grpo")

    from .post.grpo import run_grpo

    finish(run_grpo(command), command.folder.json)


def recipe(args: list[str]) -> None:
    """A whole demonstration: shoal recipe reasoning"""
    if args[:1] in (["-h"], ["--help"]):
        print("shoal recipe reasoning [OPTIONS]: a small model learns to think, from its first token to reinforcement")
        return
    if args[:1] != ["reasoning"]:
        raise UserError("shoal recipe needs the name of a demonstration: reasoning")
    command = parse(ReasoningCommand, args[1:], "recipe reasoning")

    from .post.reasoning.recipe import run_recipe

    finish(run_recipe(command), command.folder.json)


def export(args: list[str]) -> None:
    """Write a model as plain Hugging Face files"""
    command = parse(ExportCommand, args, "export")

    from .exporting import run_export

    finish(run_export(command), command.json)


def quantize(args: list[str]) -> None:
    """Write a model in 4 or 8 bits per weight"""
    command = parse(QuantizeCommand, args, "quantize")

    from .quantizing import run_quantize

    finish(run_quantize(command), command.json)


def plan(args: list[str]) -> None:
    """What a model costs before you pay for it"""
    from .plan.command import PlanCommand, run

    command = parse(PlanCommand, args, "plan")
    finish(run(command, _measurements() if command.check else None), command.json)


def _measurements() -> Measurements:
    """What `shoal plan --check` measures, which stands above the planner."""
    from .bench.check import cases

    return cases


def _wait_asleep() -> None:
    """Threads that wait for work leave their core to those that answer over HTTP. OpenMP reads this when torch brings it in."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


BENCHES: dict[str, type[Any]] = {
    "train": BenchTrainCommand,
    "engine": BenchEngineCommand,
    "quantization": BenchQuantizationCommand,
    "fp8": BenchFP8Command,
    "memory": BenchMemoryCommand,
    "rollouts": BenchRolloutsCommand,
    "serve": BenchServeCommand,
    "dispatch": BenchDispatchCommand,
    "efficiency": BenchEfficiencyCommand,
    "ablation": BenchAblationCommand,
}
"""Options of every benchmark; the module of that name in `bench` runs it."""


def bench(args: list[str]) -> None:
    """Measure Shoal beside its peers: shoal bench train --vs transformers"""
    if args[:1] in (["-h"], ["--help"]):
        print(f"shoal bench NAME [OPTIONS]; NAME is one of: {', '.join(BENCHES)}")
        return
    if not args or args[0] not in BENCHES:
        raise UserError(f"shoal bench needs the name of a benchmark: {', '.join(BENCHES)}")
    name = args[0]
    command: Any = parse(BENCHES[name], args[1:], f"bench {name}")
    if name == "serve":
        _wait_asleep()
    # What asks us to stop unwinds the stack, and so ends servers and workers, and removes folders and namespaces.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        finish(importlib.import_module(f".bench.{name}", __package__).run_bench(command), as_json=True)
    finally:
        signal.signal(signal.SIGTERM, before)


def doctor(args: list[str]) -> None:
    """Say what this machine can do and which parts of Shoal work here"""
    command = parse(DoctorCommand, args, "doctor")

    from .doctor import run_doctor

    finish(run_doctor(), command.json)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "sft": sft,
    "dpo": dpo,
    "grpo": grpo,
    "recipe": recipe,
    "eval": evaluate,
    "quantize": quantize,
    "export": export,
    "plan": plan,
    "bench": bench,
    "doctor": doctor,
}


def usage() -> str:
    lines = [f"Shoal {__version__}: train, shrink and serve DeepSeek-style language models on the hardware you have.", ""]
    lines += [f"  shoal {name:<10}{verb.__doc__}" for name, verb in VERBS.items()]
    lines += ["", "shoal VERB --help lists the options of a verb. MODEL is a run folder, a checkpoint or a Hugging Face folder."]
    return "\n".join(lines)


class _Unheard(io.FileIO):
    """A stderr whose reader may leave, as `head` does: what nobody reads any more is no reason to end a run before it has saved."""

    def write(self, data: Any) -> int:
        """All of `data` counts as written where nobody reads it."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; exit code 2 and one line on stderr for bad input."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"shoal {__version__}")
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # models write characters that not every terminal's encoding has
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__ and not sys.stderr.isatty():
        unheard = io.BufferedWriter(_Unheard(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(unheard, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)
    try:
        _refuse_broken_text(args)
        if args[0] not in VERBS:
            raise UserError(f"there is no verb {args[0]!r}: use one of {', '.join(VERBS)}")
        VERBS[args[0]](args[1:])
    except UserError as error:
        print(f"shoal: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("shoal: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout has left; say nothing, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"shoal: error: {error}: check the path, its permissions and the free space", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        what = str(error).partition("\n")[0].partition(". ")[0] or "no more is available"
        less = "a smaller model or, in training, a smaller --micro-batch-size or --recompute attention feed_forward"
        print(f"shoal: error: out of memory ({what}): take {less}", file=sys.stderr)
        return 2
    return 0


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether torch found no memory, on a GPU or on a CPU (which has no class of its own for it)."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _refuse_broken_text(args: list[str]) -> None:
    """Bytes that are not UTF-8 reach us as lone surrogates, which no file or tokenizer can hold."""
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError:
            raise UserError(f"the argument {arg!r} is not valid UTF-8: check its encoding") from None
