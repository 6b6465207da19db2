"""`shoal eval --tasks`: problems whose answers a program checks."""

from __future__ import annotations

from typing import Any

from ..config import EngineOptions, EvalCommand
from ..engine import Engine, load
from ..post.choices import Choices, examine_choices
from ..post.tasks import Score, Task, examine, parse_task

CHOICE = "choice="


def run_tasks(command: EvalCommand) -> dict[str, Any]:
    """Examine a model on all tasks; prints a table, returns the JSON object."""
    # All of them are opened before the model is: a mistyped name costs no time.
    tasks: list[Task | Choices] = [
        Choices(text.removeprefix(CHOICE)) if text.startswith(CHOICE) else parse_task(text) for text in command.tasks
    ]
    loaded = load(command.model, command.machine)
    engine = Engine(
        loaded.runner, loaded.tokenizer, EngineOptions(max_running=command.max_running, step_tokens=4 * command.max_running + 1)
    )
    context = loaded.runner.config.max_position_embeddings
    scores = []
    for task in tasks:
        if isinstance(task, Choices):
            score = examine_choices(engine, loaded.tokenizer, task, command.problems)
        else:
            score = examine(
                engine,
                loaded.tokenizer,
                task,
                count=command.problems,
                samples=command.samples,
                max_tokens=min(command.max_tokens or context, context),
                seed=command.seed,
                temperature=command.temperature,
            )
        scores.append(score)
    print_table(scores)
    return {"tasks": {score.task: {name: value for name, value in score.row().items() if name != "task"} for score in scores}}


def print_table(scores: list[Score]) -> None:
    """One line for every task."""
    width = max(len(score.task) for score in scores)
    print(f"{'task':<{width}}  problems  samples  pass@1  ± 95%   tokens  ended")
    for score in scores:
        more = "".join(f"  pass@{k} {value:.1%}" for k, value in score.pass_at.items())
        print(
            f"{score.task:<{width}}  {score.problems:>8}  {score.samples:>7}  {score.accuracy:>6.1%}  {score.error:>5.1%}  "
            f"{score.length:>6.0f}  {score.finished:>5.0%}{more}"
        )
