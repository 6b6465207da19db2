"""Options of the benchmarks of inference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .commands import MachineOptions, Model
from .errors import UserError, require_at_least_one

Case = Literal["prefill", "decode", "batch", "long", "mtp"]
CASES: tuple[Case, ...] = ("prefill", "decode", "batch", "long", "mtp")


@dataclass
class BenchEngineCommand:
    """Speed of the engine, measured beside its peers on the same weights in the same call.

    Cases: `prefill` reads 512 tokens; `decode` adds single tokens after 32 and after 512; `batch` adds one to each of 8 sequences of 512;
    `long` adds tokens after 16384; `mtp` answers prompts with and without speculation. What the model is too short for is left out.
    """

    shape: Literal["v2-lite", "demo", "train"] = "v2-lite"
    """Random weights in the shape of DeepSeek-V2-Lite (made in 4 bits on the spot; 9 GB, and 9 more for llama.cpp), of the demo, or of
    `shoal bench train`."""
    model: str | None = None
    """A trained model in place of a shape: run, checkpoint or Hugging Face folder."""
    bits: Literal[4, 8] | None = None
    """Quantize the weights (llama.cpp: q4_0, q8_0). None: 4 for v2-lite, otherwise not."""
    group: Literal[32, 64] = 32
    """Weights that share a scale on Shoal's side, as for `shoal quantize`; llama.cpp's blocks are always of 32."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Weights that are not quantized (llama.cpp: f32, f16). transformers takes the faster one whatever this says."""
    cache: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Number format of Shoal's cached tokens; `auto`: what the model computes in. The peers' are as they come."""
    vs: Annotated[tuple[Literal["llama.cpp", "transformers"], ...], tyro.conf.UseAppendAction] = ()
    """Peer to run in the same call, in turns; may be given more than once."""
    cases: tuple[Case, ...] = CASES
    """What to measure."""
    data: tuple[str, ...] = ()
    """Text whose beginnings are the prompts of `mtp`; files or folders as for `shoal train`. Without it, `mtp` is left out."""
    rounds: int = 3
    """Turns of every side; the median of its turns counts."""
    steps: int | None = None
    """Tokens added in a turn of `decode`, half as many with `batch` and `long`. None: 16 for v2-lite, 64 otherwise."""
    threads: int = 0
    """CPU threads of each side; 0: one per core."""
    cache_dir: str | None = None
    """Where the models made for the benchmark are kept for the next call; None: in the folder for temporary files."""
    llama_python: str | None = None
    """Python whose environment has llama-cpp-python; None: the one that runs Shoal."""
    json: bool = False
    """A benchmark always ends with its JSON object; accepted for the sake of scripts."""

    @property
    def uses_large_shape(self) -> bool:
        return self.model is None and self.shape == "v2-lite"

    @property
    def decode_steps(self) -> int:
        return self.steps if self.steps is not None else 16 if self.uses_large_shape else 64

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        require_at_least_one(self, "rounds", "steps")
        if self.threads < 0:
            raise UserError(f"--threads is {self.threads}: it must be 0 (one per core) or more")
        if not self.cases:
            raise UserError(f"--cases names nothing to measure: use {', '.join(CASES)}")
        if self.uses_large_shape:
            if self.bits == 8:
                raise UserError("the v2-lite shape is made in 4 bits: leave --bits away, or measure a --model")
            if "transformers" in self.vs:
                raise UserError("--vs transformers would need 32 GB for the v2-lite shape: use --shape demo, --shape train or a --model")


@dataclass
class BenchDispatchCommand:
    """Tokens on their way to experts over slow links: every node is a network namespace, its link limited by the kernel. Needs root.

    A model with DeepSeek-V3's routing (256 experts in 8 groups, 8 experts from at most 4 of them) takes the same steps with a flat
    all-to-all and with two-hop node-limited dispatch, with and without overlap. Bytes are counted at the nodes' interfaces.
    """

    nodes: int = 8
    """Network namespaces."""
    per_node: int = 1
    """Processes of every node."""
    link_mbit: float | None = None
    """Megabits a second of every node's link, each way. None: what makes communication half of the flat step."""
    hidden: int = 2048
    """Width of the model, which is what a token sends."""
    expert_width: int = 32
    """Width of an expert; small, so that steps wait for links and not for products."""
    layers: int = 1
    """Layers with experts."""
    sequence: int = 128
    """Tokens of a sequence."""
    batch: int = 4
    """Sequences of every process in a step; overlap computes them in two halves."""
    steps: int = 3
    """Of every variant, after one that warms up."""
    picture: str | None = None
    """File to draw into, .png or .svg."""
    json: bool = False
    """A benchmark always ends with its JSON object; accepted for the sake of scripts."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        require_at_least_one(self, "nodes", "per_node", "hidden", "expert_width", "layers", "sequence", "steps")
        world = self.nodes * self.per_node
        if self.nodes < 2 or 256 % world:
            raise UserError(f"{self.nodes} nodes of {self.per_node}: 256 experts need at least 2 nodes, and processes that divide them")
        if self.link_mbit is not None and not self.link_mbit > 0:
            raise UserError(f"--link-mbit is {self.link_mbit}: it must be more than 0")
        if self.batch < 2 or self.batch % 2 or self.sequence % 2:
            raise UserError("--batch and --sequence must be even: overlap computes a batch in two halves")


@dataclass
class BenchFP8Command:
    """Training in FP8 beside BF16 on the same data in the same order, and FP8 with a known mistake: gradients in blocks of 128x128.

    Before that, errors of single products over sums of different lengths. A mixture of experts 160 wide is trained once for every variant
    and seed.
    """

    data: tuple[str, ...] = ()
    """Text to train on, as for `shoal train`."""
    baseline: Literal["bf16", "fp32"] = "bf16"
    """What FP8 is compared with."""
    seeds: int = 3
    """0: only the errors of single products."""
    steps: int = 300
    """Of every run."""
    batch_size: int = 8
    """Sequences of 128 tokens in a step."""
    picture: str | None = None
    """File to draw into, .png or .svg."""
    threads: int = 0
    """CPU threads; 0: one per core."""
    json: bool = False
    """A benchmark always ends with its JSON object; accepted for the sake of scripts."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        if self.seeds < 0:
            raise UserError(f"--seeds is {self.seeds}: it must be 0 or more")
        require_at_least_one(self, "steps", "batch_size")
        if self.picture and not self.seeds:
            raise UserError("--picture draws losses: it needs --seeds 1 or more")
        if self.seeds and not self.data:
            raise UserError("there is nothing to train on: give --data PATH...")


@dataclass
class BenchMemoryCommand:
    """Peak memory of training, as the operating system counts it: what each measure saves and costs, and what transformers takes.

    The shape is that of `shoal bench train`; every run has a process of its own.
    """

    vs: Literal["transformers"] | None = None
    """Peer to run in the same call, with AdamW: in both precisions and with both forms of its experts; each with the whole batch in one
    pass, in micro-batches, and in micro-batches with gradient checkpointing."""
    batch_size: int = 8
    """Sequences of a step."""
    sequence_length: int = 512
    """Tokens of a sequence."""
    steps: int = 3
    """Of every run, after one that warms up; the median counts."""
    threads: int = 0
    """CPU threads; 0: one per core."""
    json: bool = False
    """A benchmark always ends with its JSON object; accepted for the sake of scripts."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        require_at_least_one(self, "batch_size", "sequence_length", "steps")


@dataclass
class BenchQuantizationCommand:
    """What small numbers cost: bits per byte of the same text under Shoal and llama.cpp, for the same weights in 16, 8 and 4 bits."""

    model: Model
    data: tuple[str, ...]
    """Text to score: files or folders as for `shoal eval`."""
    quantized: tuple[str, ...] = ()
    """Folders that `shoal quantize` made of MODEL, to be scored as well."""
    window: int = 512
    """Tokens that both sides see at once, without overlap; no more than the model's context."""
    max_tokens: int = 20000
    """Score whole documents until so many tokens have been scored."""
    threads: int = 0
    """CPU threads; 0: one per core."""
    llama_python: str | None = None
    """Python whose environment has llama-cpp-python; None: the one that runs Shoal."""
    json: bool = False
    """A benchmark always ends with its JSON object; accepted for the sake of scripts."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        if not self.data:
            raise UserError("there is nothing to score: give --data PATH...")
        if self.window < 2 or self.max_tokens < 2:
            raise UserError("--window and --max-tokens must be at least 2")
        names = [Path(path).name for path in self.quantized]
        twice = next((name for name in names if names.count(name) > 1 or name in ("8 bits", "4 bits")), None)
        if twice is not None:
            raise UserError(f"two rows of the table would be called {twice!r}: give the folders of --quantized names of their own")


@dataclass
class BenchServeCommand:
    """`shoal serve` under load: many clients at once, each streaming one completion after the other, some of whom hang up midway.

    Reports tokens per second, time to first token and time between tokens, beside what the engine does with requests of the same kind
    and without HTTP.
    """

    model: Model
    clients: int = 200
    """Connections that ask at the same time."""
    seconds: float = 30.0
    """Of full load on the server, all rounds together."""
    rounds: int = 3
    """In which the server and the engine alone take turns."""
    prompt_tokens: int = 32
    """Of a request."""
    tokens: int = 128
    """Of an answer that is listened to until its end."""
    hang_up: float = 1 / 3
    """Share of requests whose client hangs up somewhere before the end."""
    vs: Literal["llama.cpp"] | None = None
    """Peer under the same load, in the same call: the server of llama-cpp-python, with the model exported as GGUF (f16)."""
    llama_python: str | None = None
    """Python whose environment has llama-cpp-python[server]; None: the one that runs Shoal."""
    seed: int = 0
    """Of prompts and hang-ups."""
    json: bool = False
    """A benchmark always ends with its JSON object; accepted for the sake of scripts."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        require_at_least_one(self, "clients", "rounds", "prompt_tokens", "tokens")
        if not self.seconds > 0:
            raise UserError(f"--seconds is {self.seconds}: it must be more than 0")
        if not 0 <= self.hang_up < 1:
            raise UserError(f"--hang-up is {self.hang_up}: it must be 0 or more and less than 1")


@dataclass
class BenchRolloutsCommand:
    """Replies as reinforcement draws them: many at once, several to every prompt, with log-probabilities and experts.

    Both sides hold the weights in fp32 or bf16, as --precision says. Without --task they write the same number of tokens after random
    prompts; with it, replies to its problems, which end by themselves.
    """

    model: Model
    machine: Annotated[MachineOptions, tyro.conf.arg(name="")]
    vs: Literal["transformers"] | None = None
    """Peer to run in the same call, in turns: `generate`, with all replies in one batch."""
    task: str | None = None
    """A built-in task whose training problems are the prompts, as for `shoal grpo`."""
    prompts: int = 16
    """Different ones of a turn."""
    group: int = 8
    """Replies to every prompt."""
    prompt_tokens: int = 32
    """Of a random prompt."""
    tokens: int = 96
    """Of every reply; with --task, at most."""
    max_running: int = 128
    """Replies that Shoal writes at the same time."""
    rounds: int = 3
    """Turns of every side, after one to warm up; the median counts."""
    json: bool = False
    """A benchmark always ends with its JSON object; accepted for the sake of scripts."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        require_at_least_one(self, "prompts", "group", "prompt_tokens", "tokens", "max_running", "rounds")
