"""What follows a finished run: a few completions, the report, and what to do next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from .config import MachineOptions, SamplingOptions, TrainConfig, UserError
from .config.huggingface import export_obstacles
from .engine import complete, load
from .formats.huggingface import read_config
from .formats.locate import locate_model
from .train import Trained
from .train.report import write_report
from .train.run_folder import RunFolder

SAMPLE_TOKENS = 96


def present(trained: Trained, config: TrainConfig) -> dict[str, Any]:
    """Complete the recipe's prompts, write the report, print the result; returns the summary with the `samples` in it."""
    folder = trained.folder
    if not trained.finished:
        return trained.summary
    summary = trained.summary | {"samples": _samples(folder, config)}
    RunFolder(folder).write_json("summary.json", summary)
    try:
        report: Path | None = write_report(folder)
    except UserError as error:
        report = None
        print(f"no report: {error}", file=sys.stderr)
    if not config.json:
        _print_result(folder, summary, report)
    return summary


def _samples(folder: Path, config: TrainConfig) -> list[dict[str, str]]:
    if not config.prompts:
        return []
    loaded = load(str(folder), MachineOptions(config.device, "auto" if config.precision == "fp8" else config.precision, config.threads))
    sampling = SamplingOptions(max_tokens=SAMPLE_TOKENS, temperature=0.5, seed=config.seed)
    samples = []
    for prompt in config.prompts:
        try:
            samples.append({"prompt": prompt, "text": complete(loaded, prompt, sampling)["text"]})
        except UserError as error:  # one that is too long, say: no reason to lose the report of the run
            print(f"no sample: {error}", file=sys.stderr)
    return samples


def _print_result(folder: Path, summary: dict[str, Any], report: Path | None) -> None:
    for sample in summary["samples"]:
        print(f"\n--- {sample['prompt']!r} continues:\n{sample['prompt']}{sample['text']}")
    print(f"\nheld-out text: {summary['val_bpb']:.3f} bits per byte; xz -9e on the same text: {summary['xz_bpb']:.3f}")
    print(
        f"trained on {summary['tokens'] / 1e6:.1f}M tokens in {summary['seconds'] / 60:.1f} min, "
        f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['peak_share']:.0%} of the matmul peak"
    )
    if report is not None:
        print(f"report:   {report}")
    prompt = next((sample["prompt"] for sample in summary["samples"] if "\n" not in sample["prompt"]), "The ")
    model = shlex.quote(str(folder))
    print(f"chat:     shoal chat {model}")
    print(f"continue: shoal generate {model} {shlex.quote(prompt)}")
    if obstacles := export_obstacles(read_config(locate_model(folder))):
        print(f"plain:    shoal train exportable --data PATH --minutes 5; only Shoal knows how to read this model ({', '.join(obstacles)})")
    else:
        print(f"export:   shoal export {model} OUT --format hf")
    print("your own: shoal train --data PATH --minutes 5")
