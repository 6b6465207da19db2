"""`shoal bench rollouts`: tokens per second of replies as reinforcement draws them, Shoal and transformers in turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import BenchRolloutsCommand, EngineOptions, SamplingOptions, UserError
from ..engine import Request, load_plain
from ..formats.huggingface import save_model
from ..model import Transformer
from ..post.rollouts import Sampler


def run_bench(command: BenchRolloutsCommand) -> dict[str, Any]:
    """Both sides write as many tokens for the same prompts, seed by seed; prints a table, returns the JSON object."""
    command.validate()
    plain = load_plain(command.model, command.machine)
    if plain.model.config.max_position_embeddings < command.prompt_tokens + command.tokens:
        raise UserError(
            f"--prompt-tokens and --tokens together exceed the {plain.model.config.max_position_embeddings} that the model sees"
        )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(plain.tokenizer.vocab_size, (command.prompts, command.prompt_tokens), generator=generator)
    sides: dict[str, Callable[[int], int]] = {}
    options = EngineOptions(max_running=command.max_running, step_tokens=max(512, 4 * command.max_running))
    sampler = Sampler(plain.model, plain.tokenizer, plain.machine, options)

    def shoal(seed: int) -> int:
        sampler.refresh()  # as after every update of the weights
        requests = [
            Request(
                prompt,
                SamplingOptions(
                    max_tokens=command.tokens, temperature=1.0, logprobs=0, ignore_eos=True, seed=seed * 10**6 + i * command.group + j
                ),
                experts=True,
                prompt_experts=j == 0,
            )
            for i, prompt in enumerate(prompts.tolist())
            for j in range(command.group)
        ]
        return sum(len(result.tokens) for result in sampler.engine.run(requests))

    sides["shoal"] = shoal
    if command.vs is not None:
        sides["transformers"] = _transformers(plain.model, prompts, command)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens = 0
    for turn in range(command.rounds + 1):
        for name, draw in sides.items():
            began = time.perf_counter()
            tokens = draw(turn)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:<14}{rate:>10,.0f} tokens/s")
    result: dict[str, Any] = {
        "tokens_per_second": rates,
        "tokens": tokens,
        "precision": plain.machine.precision,
        "threads": plain.machine.threads,
    }
    if command.vs is not None:
        result["speedup"] = rates["shoal"] / rates["transformers"]
        print(f"shoal is {result['speedup']:.1f} times as fast")
    return result


def _transformers(model: Transformer, prompts: torch.Tensor, command: BenchRolloutsCommand) -> Callable[[int], int]:
    """`generate` with the cache on, all replies in one batch, in Shoal's precision for weights: fp32."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("transformers is not installed: pip install 'shoal[peers]'") from None
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model", dtype=torch.float32)
        peer = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()

    def draw(seed: int) -> int:
        torch.manual_seed(seed)
        with torch.inference_mode():
            whole = peer.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                num_return_sequences=command.group,
                min_new_tokens=command.tokens,
                max_new_tokens=command.tokens,
                pad_token_id=0,
            )
        return int(whole.shape[0] * (whole.shape[1] - prompts.shape[1]))

    return draw
