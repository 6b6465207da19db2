"""Settings of a pretraining run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from .errors import UserError
from .model import LONGEST_NGRAM, ModelConfig
from .parallel import ParallelConfig

Recomputed = Literal["swiglu", "feed_forward", "attention"]

NOT_NEGATIVE = (
    "eval_every_minutes", "threads", "optimizer.muon_lr", "optimizer.adam_lr", "optimizer.embed_lr", "optimizer.head_lr",
    "optimizer.weight_decay", "optimizer.embed_decay", "optimizer.head_decay", "optimizer.clip",
    "balance.bias_update_speed", "balance.sequence_loss", "mtp.weight", "mtp.final_weight", "checkpoint.every_steps",
    "checkpoint.every_minutes",
)  # fmt: skip
SHARES = ("schedule.warmup", "schedule.decay", "schedule.final", "schedule.extension", "mtp.begins", "teacher.share")


def parse_bytes(text: str) -> int:
    """`800M`, `4G`, `1.5GiB` as bytes; K, M, G and T are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UserError(f"{text!r} is not an amount of memory: write 800M or 4G")
    return int(float(match[1]) * 1024 ** (" KMGT".index(match[2].upper())))


@dataclass
class CorpusConfig:
    """How documents become batches."""

    text_column: str = "text"
    """Field of a JSON Lines or Parquet record that holds the text."""
    val_fraction: float = 0.01
    """Share of documents held out where the data has no `val` of its own."""
    tokenizer: str | None = None
    """A `tokenizer.json`, or a folder that holds one. None: a byte-level BPE of `model.vocab_size` is trained on the data."""
    cache: str = "~/.cache/shoal"
    """Where tokenized shards are kept; they are reused while data and tokenizer are the same."""


@dataclass
class OptimizerConfig:
    """Muon for hidden matrices, AdamW for embedding, head, router and norms."""

    name: Literal["muon", "adamw"] = "muon"
    """`adamw` uses AdamW for everything, hidden matrices with `adam_lr`."""
    muon_lr: float = 0.02
    """Hidden matrices, with name = muon; an update has a root mean square of 0.2 at rate 1."""
    muon_momentum: float = 0.95
    """Share of the running mean of gradients that a step keeps."""
    muon_steps: int = 5
    """Newton-Schulz iterations."""
    muon_split: bool = False
    """Orthogonalise what each head has of the attention's matrices by itself (Muon Split: GLM-5, 2026), as experts are."""
    adam_lr: float = 0.004
    """Router, norms, and with name = adamw everything that has no rate of its own."""
    embed_lr: float = 0.02
    """The embedding, and other tables with a row for every token."""
    head_lr: float = 0.004
    """The output head."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Shares of the running means of gradients and of their squares that a step keeps."""
    adam_eps: float = 1e-10
    """Added to what AdamW divides by."""
    weight_decay: float = 0.1
    """Decoupled: every step takes rate times decay off hidden matrices. Norms have none."""
    embed_decay: float = 0.01
    """The same for the embedding, and for other tables with a row for every token."""
    head_decay: float = 0.1
    """The same for the output head."""
    decay_by_readings: bool = True
    """Multiply all decays by how often the text has been read, once that is more than once: what is learnt by heart is to fade."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """How both optimizers' moments are kept between steps; updates are computed in fp32."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    @property
    def moments_may_be_bf16(self) -> bool:
        """Whether moments follow the gradients also where they are rounded to BF16 after every step. That puts changes of less than 2^-8
        back, and what decays by less stays as large as it ever was."""
        return max(*self.adam_betas, self.muon_momentum) <= 1 - 2**-8


@dataclass
class FP8Config:
    """Products in FP8 (DeepSeek-V3, 2412.19437, section 3.3); with precision = fp8 only."""

    power_of_two_scales: bool = True
    """Round scales up to powers of two: what is quantized again along another dimension then loses nothing but its smallest numbers."""
    gradient_tiles: Literal["1x128", "128x128"] = "1x128"
    """Numbers of an activation gradient that share a scale; 128x128 is known to do harm, and there to show it."""


@dataclass
class ScheduleConfig:
    """What changes over the budget: the learning rate, as a share of its peak, and in the end the context."""

    name: Literal["trapezoid", "cosine"] = "trapezoid"
    """A straight rise, a plateau and a straight fall, or a rise and half a cosine."""
    warmup: float = 0.02
    """Share of the budget spent rising from 0."""
    decay: float = 0.6
    """Trapezoid: share of the budget spent falling; cosine always falls for all of it."""
    final: float = 0.0
    """Share of the peak left at the end."""
    extension: float = 0.0
    """Share of the budget, at its end, in which a model trained on rows of `sequence_length` gets used to YaRN (2309.00071), with which it
    sees `model.max_position_embeddings` tokens. A model to `--start` from keeps the context that it has."""


@dataclass
class BalanceConfig:
    """Expert load balancing (2408.15664; DeepSeek-V3, 2412.19437, section 2.1.2)."""

    bias_update_speed: float = 0.001
    """Step of the routing bias after each optimizer step; 0 turns auxiliary-loss-free balancing off."""
    sequence_loss: float = 1e-4
    """Weight alpha of the sequence-wise balance loss; 0 turns it off."""


@dataclass
class MTPConfig:
    """Weight of the multi-token prediction loss, linear from `weight` to `final_weight` over the budget."""

    weight: float = 0.3
    """At the beginning."""
    final_weight: float = 0.1
    """At the end."""
    begins: float = 0.0
    """Share of the budget after which it is learnt; before, it costs nothing. With its second pass through the head it is much of what a
    small model computes."""


@dataclass
class TeacherConfig:
    """Softer targets: what followed the last tokens elsewhere, counted in half of the documents while the model studies the others."""

    order: int = 0
    """Longest context that is counted; 0 for no teacher."""
    share: float = 0.95
    """Weight of the counted distribution in the target, at most; the token that did follow has the rest."""
    fade: float = 0.08
    """Times the tokens of the text: so many are read before the weight falls, then as 1 / tokens read."""
    repetitions: bool = False
    """Teach also what followed the last tokens when the row had them before. For models that can look there (`model.init` copying)."""


@dataclass
class SampledSoftmaxConfig:
    """Sampled softmax (Bengio & Senecal, 2008; Jean et al., 1412.2007): in training the head gives the logits of a few candidates of every
    position instead of all. The target is one. Scores and answers take all logits, as ever."""

    likeliest: int = 0
    """Candidates that counts hold likeliest; needs `teacher.order` or `model.count_order`."""
    drawn: int = 0
    """Candidates that are drawn at random, frequent tokens more often, and stand for all others; 0: the head gives all logits."""


@dataclass
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int = 0
    """Save every so many steps; 0: only by time."""
    every_minutes: float = 2.0
    """Save when this long has passed since the last save, or longer, so that saving takes a 25th of the time at most; 0: only by steps."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Keep the one with the best evaluation, too."""


@dataclass
class TrainConfig:
    """Everything `shoal train` can be told. One of `minutes`, `tokens` and `steps` sets the budget."""

    data: tuple[str, ...] = ()
    """Text, JSON Lines (.gz, .zst) or Parquet files or folders, or hf:NAME for a Hugging Face dataset. Without: the Python standard
    library's source on this machine."""
    start: str | None = None
    """MODEL whose weights, shape and tokenizer to begin with, in place of random weights in the shape of `model`."""
    qat: Literal["int4"] | None = None
    """With --start: round matrices to 4 bits in every forward pass, as `shoal quantize --bits 4` will do when training is over."""
    out: str | None = None
    """Run folder. None: a new one under runs/."""
    resume: bool = False
    """Go on from the last complete checkpoint in --out (default: the newest run of `shoal train` under runs/)."""
    overwrite: bool = False
    """Discard a run that --out already holds."""
    json: bool = False
    """End stdout with the summary as one JSON object."""

    minutes: float | None = None
    """Time budget of the training loop; the schedule ends when it ends."""
    tokens: int | None = None
    """The budget in tokens."""
    steps: int | None = None
    """The budget in optimizer steps."""
    sequence_length: int = 512
    """Tokens of a row."""
    batch_size: int = 16
    """Sequences per optimizer step, over all ranks."""
    memory_limit: str | None = None
    """Most memory the run may take, as in 800M or 4G: the cheapest of the measures that keep it is taken (micro-batches, `recompute`,
    `return_memory`, BF16 moments, and with --offload optimizer state on disk), found with the planner and tried before the run begins."""
    recompute: tuple[Recomputed, ...] = ()
    """What is computed again in the backward pass instead of being kept: `swiglu` (its result), `feed_forward` (all inside that half of a
    layer), `attention` (the other half)."""
    return_memory: bool = False
    """Give freed memory back to the system at once: about a tenth slower, and fewer gaps."""
    offload: bool = False
    """Keep the experts' optimizer state in a file, of which only what is being updated is in memory."""
    update_early: bool = False
    """Update a parameter as soon as its gradient is there, which is then let go. Needs optimizer.clip = 0 and one micro-batch a step."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; None: all that a process gets of a batch, or one in a pipeline."""
    eval_every_minutes: float = 1.0
    """Time between quick evaluations on held-out text during training; 0: only at the end."""
    eval_tokens: int = 32768
    """Held-out tokens of a quick evaluation; the final one reads everything, up to 64 times as many."""
    seed: int = 0
    """Of first weights and the order of the data."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """`auto` takes bf16 where it multiplies faster than fp32 by a factor of 1.3 (on a CPU 4), else fp32. `fp8`: matrices of attention and
    feed-forward layers multiply in block-scaled FP8, everything else runs in fp32 (on a GPU in bf16)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0: one per core, divided among the processes on a machine."""
    nproc: int = 1
    """Processes to start on this machine; under torchrun that says how many there are."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder."""
    prompts: tuple[str, ...] = ()
    """Completed by the trained model at the end, for a first impression."""

    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    fp8: FP8Config = field(default_factory=FP8Config)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sampled_softmax: SampledSoftmaxConfig = field(default_factory=SampledSoftmaxConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    def validate_sampled_softmax(self) -> None:
        """Raise `UserError` where candidates cannot be had."""
        sampled = self.sampled_softmax
        if sampled.likeliest < 0 or sampled.drawn < 0:
            raise UserError("sampled_softmax.likeliest and sampled_softmax.drawn must be 0 or more")
        if sampled.likeliest and not sampled.drawn:
            raise UserError("sampled_softmax.likeliest needs others beside it: set sampled_softmax.drawn, to 64 for instance")
        if not sampled.drawn:
            return
        if 2 + sampled.likeliest > self.model.vocab_size:
            raise UserError(f"sampled_softmax.likeliest is {sampled.likeliest}: there are only {self.model.vocab_size} tokens")
        if self.sequence_length <= self.model.num_nextn_predict_layers:
            raise UserError("sampled_softmax needs rows longer than model.num_nextn_predict_layers: raise sequence_length")
        if sampled.likeliest and not (self.teacher.order or self.model.count_order):
            raise UserError("only counts know which tokens are likely: set teacher.order, or sampled_softmax.likeliest 0")
        if self.model.logit_softcap:
            raise UserError("sampled_softmax does not know model.logit_softcap: set one of them to 0")

    def validate_budget(self) -> None:
        """Raise `UserError` unless exactly one budget is set, to more than nothing."""
        budgets = [name for name in ("minutes", "tokens", "steps") if getattr(self, name) is not None]
        if len(budgets) != 1:
            raise UserError(f"the budget is set {len(budgets)} times: give exactly one of --minutes, --tokens and --steps")
        if not 0 < getattr(self, budgets[0]) < math.inf:
            raise UserError(f"--{budgets[0]} is {getattr(self, budgets[0])}: it must be more than 0")

    def validate(self) -> None:
        """Raise `UserError` on the first setting that cannot work."""
        self.model.validate()
        self.parallel.validate()
        self.validate_budget()
        for name in ("sequence_length", "batch_size", "eval_tokens", "nproc", "optimizer.muon_steps", "checkpoint.keep_last"):
            if (value := attrgetter(name)(self)) < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        for name in NOT_NEGATIVE:
            if not 0 <= (value := attrgetter(name)(self)) < math.inf:
                raise UserError(f"{name} is {value}: it must be 0 or more")
        for name in SHARES:
            if not 0 <= (value := attrgetter(name)(self)) <= 1:
                raise UserError(f"{name} is {value}: it must lie between 0 and 1")
        if not 1e-30 <= self.optimizer.adam_eps < math.inf:
            raise UserError(
                f"optimizer.adam_eps is {self.optimizer.adam_eps:g}: it must be at least 1e-30, so that fp32 does not divide by zero "
                "where there was no gradient yet"
            )
        if not all(0 <= value < 1 for value in (*self.optimizer.adam_betas, self.optimizer.muon_momentum)):
            raise UserError("optimizer.adam_betas and optimizer.muon_momentum must be 0 or more and less than 1")
        if self.optimizer.moments == "bf16" and not self.optimizer.moments_may_be_bf16:
            raise UserError(
                "optimizer.moments bf16 would round away all that optimizer.adam_betas or optimizer.muon_momentum let go of in a step: "
                "choose fp32, or 0.996 at most for each of them"
            )
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}: it must lie between 0 and 2^64 - 1")
        if self.sequence_length > self.model.max_position_embeddings:
            raise UserError(
                f"sequence_length {self.sequence_length} is longer than model.max_position_embeddings "
                f"{self.model.max_position_embeddings}: lower the first or raise the second"
            )
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise UserError(f"micro_batch_size {micro} does not divide batch_size {self.batch_size}: choose a divisor")
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit)
            if self.teacher.order or self.model.count_order:
                raise UserError("--memory-limit does not know what counting n-grams takes: name a recipe, as in shoal train default")
        if not 0 <= self.teacher.order <= LONGEST_NGRAM:
            raise UserError(f"teacher.order is {self.teacher.order}: it must be 0 for no teacher, or 1 to {LONGEST_NGRAM}")
        if not self.teacher.fade > 0:
            raise UserError(f"teacher.fade is {self.teacher.fade:g}: it must be more than 0")
        if self.teacher.repetitions and (not self.teacher.order or self.model.repeat_window):
            raise UserError(
                "teacher.repetitions is for a teacher that counts (teacher.order) and a model that is not told of repetitions "
                "(model.repeat_window 0): change these, or set teacher.repetitions false"
            )
        if self.teacher.order and (self.model.count_order or self.model.logit_softcap):
            raise UserError("a teacher that counts is for models without counts and without logit_softcap: set teacher.order 0")
        self.validate_sampled_softmax()
        if self.qat and self.start is None:
            raise UserError("--qat int4 fine-tunes: name the model to begin with by --start (matrices that start at zero would stay there)")
        if self.qat and (self.precision == "fp8" or "swiglu" in self.recompute):
            raise UserError("--qat int4 has products of its own: leave precision fp8 and recompute swiglu away")
        if self.update_early and (self.optimizer.clip or (micro or self.batch_size) != self.batch_size):
            raise UserError("update_early needs whole gradients at once: set optimizer.clip 0 and leave micro_batch_size away")
        if self.precision == "fp8" and "swiglu" in self.recompute:
            raise UserError("with precision fp8 the result of SwiGLU is always computed again: leave swiglu out of recompute")
        if not 0 < self.corpus.val_fraction < 1:
            raise UserError(f"corpus.val_fraction is {self.corpus.val_fraction}: it must lie between 0 and 1")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite contradict each other: give one of them")
