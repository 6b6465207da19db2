"""`shoal recipe reasoning`: pretraining, fine-tuning and reinforcement of a small model, one after the other, and what came of it."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from ...config import (
    BalanceConfig,
    CorpusConfig,
    EngineOptions,
    GRPOCommand,
    ModelConfig,
    OptimizerConfig,
    ReasoningCommand,
    RunFolderOptions,
    SFTCommand,
    TrainConfig,
    TuneOptions,
)
from ...engine import Engine, load
from ...formats.locate import locate_model
from ...train import train
from ...train.run_folder import RunFolder, new_run
from ..grpo import run_grpo
from ..sft import run_sft
from ..tasks import Score, examine, parse_task, prompt_of
from .corpus import demonstrations, documents
from .figure import draw

TASKS = ("countdown", "arithmetic")
READS = ("countdown", "countdown", "arithmetic", "countdown")
"""Of whose problems pretraining reads, in turn."""
TOKENS_PER_DOCUMENT = 74
"""About; so that no document is read twice."""
SHOWN = 3
"""Problems of each task whose replies are printed at the end."""
SAMPLES = 2
"""Replies to every held-out problem in the final comparison."""


def run_recipe(command: ReasoningCommand) -> dict[str, Any]:
    """All stages; figures go to the run folder, what happens to stderr, the outcome to stdout. Returns the summary."""
    refuse_what_cannot_work(command)
    began = time.perf_counter()
    folder = new_run(command.folder, "reasoning")
    folder.write_json("run.json", {"requested": dataclasses.asdict(command)})
    data = folder.path / "data"
    data.mkdir()

    base = command.base or str(folder.path / "base")
    if command.base is None:
        say("1/4 pretraining on worked problems")
        count = 2 * command.pretrain_tokens // TOKENS_PER_DOCUMENT
        write_rows(data / "pretrain.jsonl", ({"text": text} for text in documents(READS, count, command.seed)))
        stop_if(not train(pretraining(command, data / "pretrain.jsonl", Path(base))).finished, folder)

    say("2/4 fine-tuning on right answers, few of which show their work")
    write_rows(data / "sft.jsonl", demonstrations(TASKS, command.demonstrations, command.seed, command.openness))
    tuned = folder.path / "sft"
    stop_if(run_sft(fine_tuning(command, base, data / "sft.jsonl", tuned))["stopped"], folder)

    say("3/4 reinforcement")
    improved = folder.path / "grpo"
    stop_if(run_grpo(reinforcement(command, str(tuned), improved))["stopped"], folder)

    say("4/4 for comparison: the fine-tuned model reads as many more right answers as reinforcement gave replies")
    presentations = command.steps * command.prompts * command.group
    write_rows(data / "more.jsonl", demonstrations(TASKS, presentations, command.seed + 1, command.openness))
    continued = folder.path / "more-sft"
    stop_if(run_sft(fine_tuning(command, str(tuned), data / "more.jsonl", continued))["stopped"], folder)

    scores = {name: score(command, path) for name, path in (("sft", tuned), ("more sft", continued), ("grpo", improved))}
    summary = {
        "presentations": presentations,
        "seconds": round(time.perf_counter() - began, 1),
        "folder": str(folder.path),
        "scores": {name: [one.row() for one in of_model] for name, of_model in scores.items()},
        "gain": gain(scores["grpo"], scores["sft"]),
        "gain_over_more_sft": gain(scores["grpo"], scores["more sft"]),
        "figure": draw(improved / "metrics.jsonl", folder.path / "reasoning.png"),
    }
    folder.write_json("summary.json", summary)
    report(command, folder, summary, scores, improved)
    return summary


def refuse_what_cannot_work(command: ReasoningCommand) -> None:
    """Raise `UserError` on what would otherwise come up in a later stage."""
    command.validate()
    if command.base is not None:
        locate_model(command.base)
    nowhere = Path("nowhere")
    pretraining(command, nowhere, nowhere).validate()
    fine_tuning(command, "", nowhere, nowhere).validate()
    reinforcement(command, "", nowhere).validate()
    for task in TASKS:
        for _ in islice(parse_task(task).problems("test", command.seed), command.eval_problems):
            pass


def stop_if(stopped: bool, folder: RunFolder) -> None:
    """Leave as an interrupted command does, where a stage was asked to stop and has saved what it had."""
    if stopped:
        say(f"stopped: the later stages are left away; what there is lies in {folder.path}")
        raise KeyboardInterrupt


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def pretraining(command: ReasoningCommand, data: Path, out: Path) -> TrainConfig:
    """A model of 1.3M parameters, 0.9M of them active, with a vocabulary of little more than bytes: digits are tokens."""
    return TrainConfig(
        data=(str(data),),
        out=str(out),
        tokens=command.pretrain_tokens,
        sequence_length=256,
        batch_size=32,
        eval_every_minutes=0,
        eval_tokens=4096,
        seed=command.seed,
        device=command.machine.device,
        precision=command.machine.precision,
        threads=command.machine.threads,
        model=ModelConfig(
            vocab_size=384,
            hidden_size=128,
            num_hidden_layers=4,
            intermediate_size=384,
            num_attention_heads=4,
            max_position_embeddings=1024,
            kv_lora_rank=64,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
            init="fan_in",
            zero_init_output=True,
        ),
        corpus=CorpusConfig(cache=str(out.parent / "data" / "cache")),
        optimizer=OptimizerConfig(muon_lr=0.01, embed_lr=0.2, head_lr=0.02, adam_lr=0.01),
        balance=BalanceConfig(bias_update_speed=0.005),
    )


def fine_tuning(command: ReasoningCommand, model: str, data: Path, out: Path) -> SFTCommand:
    """Small updates and a high rate: the tokens of the chat template are new to the model."""
    tune = TuneOptions(lr=3e-3, seed=command.seed)
    folder = RunFolderOptions(out=str(out))
    return SFTCommand(model, tune=tune, folder=folder, machine=command.machine, data=(str(data),), batch_tokens=4096)


def reinforcement(command: ReasoningCommand, model: str, out: Path) -> GRPOCommand:
    return GRPOCommand(
        model,
        tune=TuneOptions(lr=5e-4, seed=command.seed),
        folder=RunFolderOptions(out=str(out)),
        machine=command.machine,
        tasks=TASKS,
        steps=command.steps,
        prompts=command.prompts,
        group=command.group,
        max_tokens=command.max_tokens,
        eval_every=max(1, command.steps // 8),
        eval_problems=command.eval_problems,
    )


def score(command: ReasoningCommand, model: Path) -> list[Score]:
    """A model on the held-out problems of every task."""
    loaded = load(str(model), command.machine)
    engine = Engine(loaded.runner, loaded.tokenizer, EngineOptions(max_running=128, step_tokens=512))
    return [
        examine(
            engine,
            loaded.tokenizer,
            parse_task(task),
            count=command.eval_problems,
            samples=SAMPLES,
            max_tokens=command.max_tokens,
            seed=command.seed,
        )
        for task in TASKS
    ]


def gain(after: list[Score], before: list[Score]) -> float:
    """Difference of the mean accuracies over tasks."""
    return sum(a.accuracy - b.accuracy for a, b in zip(after, before, strict=True)) / len(after)


def report(command: ReasoningCommand, folder: RunFolder, summary: dict[str, Any], scores: dict[str, list[Score]], model: Path) -> None:
    """Print some thoughts, and the figures."""
    loaded = load(str(model), command.machine)
    engine = Engine(loaded.runner, loaded.tokenizer, EngineOptions(max_running=16))
    for name in TASKS:
        task = parse_task(name)
        for _, problem in zip(range(SHOWN), task.problems("test", command.seed), strict=False):
            [result] = engine.generate([prompt_of(loaded.tokenizer, task, problem)])
            print(f"\n> {problem.question}\n{result.text}")
    print(f"\n{'pass@1 on held-out problems':<28}" + "".join(f"{name:>22}" for name in TASKS))
    for name, of_model in scores.items():
        print(f"{name:<28}" + "".join(f"{one.accuracy:>9.1%} ± {one.error:.1%} ({one.length:>3.0f})" for one in of_model))
    print(f"(in brackets: mean tokens of a reply)\nreinforcement: {100 * summary['gain']:+.1f} points over fine-tuning, ", end="")
    print(f"{100 * summary['gain_over_more_sft']:+.1f} over as much more of it; {summary['seconds'] / 60:.1f} minutes in all")
    if summary["figure"]:
        print(f"figure: {summary['figure']}")
    print(f"chat:   shoal chat {shlex.quote(str(folder.path / 'grpo'))}")
