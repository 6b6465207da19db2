"""The verbs. Each parses its options, calls the part of Shoal that does the work, and prints the result."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from .options import parse

if TYPE_CHECKING:
    from .plan.command import Measurements


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The last line on stdout is one JSON object where that was asked for."""
    if as_json:
        print(json.dumps(finite(result), ensure_ascii=False, allow_nan=False))


def train(args: list[str]) -> None:
    """Pretrain a model: shoal train [RECIPE] [--data PATH...] [--minutes 5] ..."""
    from .config.recipes import load_recipe, recipe_names, with_one_budget
    from .dial import derive

    given = list(args)
    derived = derive(args)
    named = bool(args) and not args[0].startswith("-")
    default = derived or load_recipe(args.pop(0) if named else "default")
    if "--help" in args or "-h" in args:
        print(f"shoal train [RECIPE] [OPTIONS]; RECIPE is a TOML file or one of: {', '.join(recipe_names())}")
        print(
            "shoal train [RULES] --minutes 5 [OPTIONS], or --flops 1e13, or --params 5M: shape, batch, rates and tokens from a budget or\n"
            "about a size; RULES: full (where neither rules nor a recipe are named), exportable (plain deepseek_v3 files) or baseline\n"
            "Without a name and without --minutes, --flops and --params: the recipe default. What options are by default is said for that\n"
            "recipe; rules choose shape, batch, rates and precision themselves.\n"
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
    if config.memory_limit and not is_member():
        from .memory_limit import fit, go_on

        config = go_on(config) if config.resume else fit(config)
    with ending_with_others():
        trained = run(config)
    if trained.reports:
        finish(present(trained, config), config.json)


def _start_processes(config: TrainConfig, args: list[str] | None) -> None:
    """Refuse what cannot work, then run `shoal train ARGS`, or for None what `config` says, in `config.nproc` processes."""
    from .config.recipes import write_toml
    from .parallel.launch import launch
    from .parallel.layout import layout_of
    from .train.trainer import begin_with

    if config.start:
        config, _ = begin_with(config)
    config.validate()
    layout_of(config, config.nproc)
    with tempfile.TemporaryDirectory() as folder:
        if args is None:  # rules measure the machine, and another process would find another model
            args = [write_toml(config, Path(folder) / "settings.toml")]
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
    """Write a model as Hugging Face files or GGUF"""
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
    from .plan.command import run
    from .plan.options import PlanCommand

    command = parse(PlanCommand, args, "plan")
    finish(run(command, _measurements() if command.check else None), command.json)


def _measurements() -> Measurements:
    """What `shoal plan --check` measures, which stands above the planner."""
    from .bench.plan_check import cases

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
