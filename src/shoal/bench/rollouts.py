"""`shoal bench rollouts`: tokens per second of replies as reinforcement draws them, Shoal and transformers in turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..config import BenchRolloutsCommand, EngineOptions, SamplingOptions, UserError
from ..config.huggingface import export_obstacles
from ..engine import Plain, Request, load_plain
from ..formats.huggingface import save_model
from ..post.rollouts import Sampler
from ..post.tasks import parse_task, prompt_of


def run_bench(command: BenchRolloutsCommand) -> dict[str, Any]:
    """Both sides write as many tokens for the same prompts, seed by seed; prints a table, returns the JSON object."""
    command.validate()
    plain = load_plain(command.model, command.machine)
    if plain.model.config.max_position_embeddings < command.prompt_tokens + command.tokens:
        raise UserError(
            f"--prompt-tokens and --tokens together exceed the {plain.model.config.max_position_embeddings} that the model sees"
        )
    if command.vs is not None and (obstacles := export_obstacles(plain.model.config)):
        raise UserError(f"transformers would compute something else from this model ({'; '.join(obstacles)}): leave --vs away")
    generator = torch.Generator().manual_seed(0)
    if command.task is None:
        prompts = torch.randint(plain.tokenizer.vocab_size, (command.prompts, command.prompt_tokens), generator=generator).tolist()
    else:
        task = parse_task(command.task)
        asked = islice(task.problems("train", 0), command.prompts)
        prompts = [prompt_of(plain.tokenizer, task, problem) for problem in asked]
    sides: dict[str, Callable[[int], int]] = {}
    options = EngineOptions(max_running=command.max_running, step_tokens=max(512, 4 * command.max_running))
    sampler = Sampler(plain.model, plain.tokenizer, plain.machine, options)

    def shoal(seed: int) -> int:
        sampler.refresh()  # as after every update of the weights
        requests = [
            Request(
                prompt,
                SamplingOptions(
                    max_tokens=command.tokens,
                    temperature=1.0,
                    logprobs=0,
                    ignore_eos=command.task is None,
                    seed=seed * 10**6 + i * command.group + j,
                ),
                experts=True,
                prompt_experts=j == 0,
            )
            for i, prompt in enumerate(prompts)
            for j in range(command.group)
        ]
        return sum(len(result.tokens) for result in sampler.engine.run(requests))

    sides["shoal"] = shoal
    if command.vs is not None:
        sides["transformers"] = _transformers(plain, prompts, command)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    made: dict[str, list[int]] = {name: [] for name in sides}
    for turn in range(command.rounds + 1):
        for name, draw in sides.items():
            began = time.perf_counter()
            tokens = draw(turn)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
                made[name].append(tokens)
    rates = {name: statistics.median(n / s for n, s in zip(made[name], times, strict=True)) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:<14}{rate:>10,.0f} tokens/s")
    result: dict[str, Any] = {
        "tokens_per_second": rates,
        "tokens": {name: sum(counts) for name, counts in made.items()},
        "precision": plain.machine.precision,
        "threads": plain.machine.threads,
    }
    if command.vs is not None:
        result["speedup"] = rates["shoal"] / rates["transformers"]
        print(f"shoal is {result['speedup']:.1f} times as fast")
    return result


def _transformers(plain: Plain, prompts: list[list[int]], command: BenchRolloutsCommand) -> Callable[[int], int]:
    """`generate` with the cache on, all replies in one batch, prompts padded on the left; returns the tokens before padding."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("transformers is not installed: pip install 'shoal[peers]'") from None
    eos, dtype = plain.tokenizer.eos_id, torch.bfloat16 if plain.machine.precision == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        save_model(plain.model, Path(folder) / "model", dtype=dtype)
        peer = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype).eval()

    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def draw(seed: int) -> int:
        torch.manual_seed(seed)
        with torch.inference_mode():
            whole = peer.generate(
                padded,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                num_return_sequences=command.group,
                min_new_tokens=command.tokens if command.task is None else 1,
                max_new_tokens=command.tokens,
                eos_token_id=eos,
                pad_token_id=0,
            )
        ends = (whole[:, longest:] == eos).int()
        return int((ends.cumsum(1) == ends).sum())  # up to the first end, and with it

    return draw
