"""Options of the verbs other than `train`. MODEL is a run folder, a checkpoint folder, or a Hugging Face-style folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from .engine import RunOptions, SamplingOptions
from .errors import UserError, require_at_least_one

Model = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="MODEL", help="Run folder, checkpoint folder, or Hugging Face-style folder."),
]

HF_DTYPES = ("fp32", "bf16", "fp16", "fp8")
GGUF_DTYPES = ("f32", "f16", "q8_0", "q4_0")


@dataclass
class MachineOptions:
    """Where a command runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one; but what writes answers stays on the CPU, where the model runs in the C++ kernels."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of products. `auto`: the C++ kernels, which run models on CPUs, keep the numbers that the files hold; elsewhere bf16 where it is
    faster than fp32 by a factor of 1.3 (on a CPU 4)."""
    threads: int = 0
    """CPU threads; 0: one per core."""


@dataclass
class GenerateCommand:
    """Continue PROMPT."""

    model: Model
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """Text to continue; - reads it from standard input."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")]
    run: Annotated[RunOptions, tyro.conf.arg(name="")]
    machine: Annotated[MachineOptions, tyro.conf.arg(name="")]
    json: bool = False
    """End with one JSON object: text, tokens, finish_reason, tokens_per_second, acceptance of guessed tokens."""


@dataclass
class ChatCommand:
    """Talk to a model in the terminal. A base model, which has no chat template, continues what you type."""

    model: Model
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")]
    run: Annotated[RunOptions, tyro.conf.arg(name="")]
    machine: Annotated[MachineOptions, tyro.conf.arg(name="")]
    system: str | None = None
    """System prompt."""


@dataclass
class EvalCommand:
    """Bits per byte of text under a model (--data), or how many problems it solves (--tasks).

    Of text, every token is scored once, with at least --overlap tokens of context.
    """

    model: Model
    machine: Annotated[MachineOptions, tyro.conf.arg(name="")]
    data: tuple[str, ...] = ()
    """Files or folders as for `shoal train`; a folder that holds `train` and `val` is scored on the latter, anything else whole."""
    text_column: str = "text"
    """Field of a JSON Lines or Parquet record that holds the text."""
    window: int | None = None
    """Tokens the model sees at once. None: as in training, or the model's longest context up to 2048."""
    overlap: int | None = None
    """Tokens of context at least, from the second window of a document on. None: half a window."""
    max_tokens: int | None = None
    """Score whole documents until so many tokens have been scored; with --tasks, the longest reply. None: all of the text, or the model's
    whole context."""
    tasks: tuple[str, ...] = ()
    """arithmetic, countdown, sorting, strings (also NAME:DIFFICULTY or NAME:FROM-TO), gsm8k=FILE, humaneval=FILE, choice=FILE."""
    problems: int = 200
    """Of every task, at most."""
    samples: int = 1
    """Replies to every problem; with more than one, also pass@k."""
    temperature: float = 1.0
    """Of the replies."""
    thinking: bool = False
    """Have replies begin with a thought, where the chat template leaves the choice (v3.1)."""
    seed: int = 0
    """Of what is drawn."""
    max_running: int = 64
    """Replies that are written at the same time."""
    json: bool = False
    """End with one JSON object: bpb, nats_per_token, tokens, bytes; with --tasks: accuracy, error, length, ... by task."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        if bool(self.data) == bool(self.tasks):
            raise UserError("give --data PATH... to score text, or --tasks NAME... to have problems solved")
        require_at_least_one(self, "problems", "samples", "max_running", "max_tokens")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}: it must be 0 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}: it must lie between 0 and 2^32 - 1")


@dataclass
class ExportCommand:
    """Write a model as plain files that other software opens."""

    model: Model
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder (hf) or file (gguf) to write; it must be new, empty, or an earlier export."""
    format: Literal["hf", "gguf"] = "hf"
    """`hf`: a Hugging Face folder for transformers, vLLM and SGLang; `gguf`: one file for llama.cpp."""
    dtype: Literal["fp32", "bf16", "fp16", "fp8", "f32", "f16", "q8_0", "q4_0"] | None = None
    """Number format of the weights: fp32, bf16, fp16 or fp8 (the official block-scaled layout) for `hf` (None: as they are, FP8 as bf16);
    f32, f16 (also None), q8_0 or q4_0 for `gguf`."""
    json: bool = False
    """End with one JSON object: out, model_type, dtype, bytes."""

    def validate(self) -> None:
        if self.format == "hf" and (self.dtype in GGUF_DTYPES or self.out.endswith(".gguf")):
            raise UserError(f"{self.out} would be a Hugging Face folder: add --format gguf, or choose another name or --dtype")
        allowed = HF_DTYPES if self.format == "hf" else GGUF_DTYPES
        if self.dtype is not None and self.dtype not in allowed:
            raise UserError(f"--dtype {self.dtype} is not a type of {self.format} files: use one of {', '.join(allowed)}")


@dataclass
class QuantizeCommand:
    """Write a model in 4 or 8 bits per weight, in a folder that Shoal maps into memory as it is.

    Norms and routers stay fp32, the embedding bf16; the output head and the layers of multi-token prediction get 8 bits.
    """

    model: Model
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write; it must be new, empty, or an earlier quantized model."""
    bits: Literal[4, 8] = 4
    """Of a weight."""
    group: Literal[32, 64] = 32
    """Weights that share a scale."""
    calibrate: tuple[str, ...] = ()
    """Text, as for `shoal train`, on whose inputs the layers shall change least (GPTQ and coordinate descent). Without: every weight is
    rounded to the nearest step."""
    calibrate_tokens: int = 65536
    """Tokens of that text, at most."""
    data: tuple[str, ...] = ()
    """Text to measure bits per byte on, as for `shoal eval`. Without: what is held out of the text for calibration, if there is any."""
    text_column: str = "text"
    """Field of a JSON Lines or Parquet record that holds the text."""
    threads: int = 0
    """CPU threads; 0: one per core."""
    json: bool = False
    """End with one JSON object: bytes, bits_per_weight, bpb_before, bpb_after, bpb_increase, weight_error, matrices, ..."""

    def validate(self) -> None:
        require_at_least_one(self, "calibrate_tokens")


@dataclass
class DoctorCommand:
    """Say what this machine can do and which parts of Shoal work here."""

    json: bool = False
    """End with one JSON object."""


@dataclass
class BenchTrainCommand:
    """Training throughput, measured beside transformers on the same model shape, batch and machine.

    The shape: vocabulary 8192, hidden 384, 8 layers (the first dense, width 1024), 6 heads, kv_lora_rank 128, nope / rope / v
    64 / 32 / 64, 16 routed experts of width 192, 4 per token, 1 shared.
    """

    vs: Literal["transformers"] | None = None
    """Peer to run in the same call, in turns."""
    batch_size: int = 8
    """Sequences of a step."""
    sequence_length: int = 512
    """Tokens of a sequence."""
    rounds: int = 5
    """Turns of every contestant; the median of its turns counts."""
    steps: int = 2
    """Training steps of a turn."""
    threads: int = 0
    """CPU threads; 0: one per core."""
    json: bool = False
    """A benchmark always ends with its JSON object; accepted for the sake of scripts."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        require_at_least_one(self, "batch_size", "sequence_length", "rounds", "steps")
