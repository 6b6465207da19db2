"""`shoal eval --tasks`: problems whose answers a program checks."""

from __future__ import annotations

from typing import Any

from ..config import EngineOptions, EvalCommand
from ..engine import Engine, load
from ..post.choices import Choices, examine_choices
from ..post.tasks import Score, Task, examine, parse_task, refuse_thinking

CHOICE = "choice="


def run_tasks(command: EvalCommand) -> dict[str, Any]:
    """Examine a model on all tasks; prints a table, returns the JSON object."""
    # All of them are opened before the model is: a mistyped name costs no time.
    tasks: list[Task | Choices] = [
        Choices(text.removeprefix(CHOICE)) if text.startswith(CHOICE) else parse_task(text) for text in command.tasks
    ]
    loaded = load(command.model, command.machine)
    if command.thinking:
        refuse_thinking(loaded.tokenizer)
    engine = Engine(
        loaded.runner, loaded.tokenizer, EngineOptions(max_running=command.max_running, step_tokens=4 * command.max_running + 1)
    )
    context = loaded.runner.config.max_position_embeddings
    width = max(len(task.name) for task in tasks)
    print(f"{'task':<{width}}  problems  samples  pass@1  ± 95%   tokens  ended")
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
                thinking=command.thinking,
            )
        scores.append(score)
        print(line(score, width))
    return {"tasks": {score.task: {name: value for name, value in score.row().items() if name != "task"} for score in scores}}


def line(score: Score, width: int) -> str:
    """A task's line of the table; `width` is that of the names."""
    more = "".join(f"  pass@{k} {value:.1%}" for k, value in score.pass_at.items())
    return (
        f"{score.task:<{width}}  {score.problems:>8}  {score.samples:>7}  {score.accuracy:>6.1%}  {score.error:>5.1%}  "
        f"{score.length:>6.0f}  {score.finished:>5.0%}{more}"
    )
