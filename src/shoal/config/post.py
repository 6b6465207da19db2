"""Options of post-training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from .commands import MachineOptions, Model
from .errors import UserError, require_at_least_one


@dataclass
class RunFolderOptions:
    """Where a run is written."""

    out: str | None = None
    """Run folder. None: a new one under runs/."""
    overwrite: bool = False
    """Discard a run that --out already holds."""
    save_minutes: float = 10.0
    """Minutes between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    json: bool = False
    """End stdout with the summary as one JSON object."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        if not 0 <= self.save_minutes < math.inf:
            raise UserError(f"--save-minutes is {self.save_minutes}: it must be 0 or more")
        require_at_least_one(self, "keep_last")


@dataclass
class TuneOptions:
    """How weights change."""

    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup: float = 0.03
    """Share of the steps in which it rises; it then falls linearly to `final`."""
    final: float = 0.1
    """Share of the peak that is left at the end."""
    weight_decay: float = 0.0
    """Decoupled: every step takes rate times decay off the weights."""
    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    micro_tokens: int = 8192
    """Tokens of one forward pass, at most."""
    lora_rank: int = 0
    """Train adapters of this rank on attention and experts instead of the weights; 0: train the weights."""
    lora_alpha: float = 0.0
    """Scale of the adapters times their rank; 0: twice the rank."""
    seed: int = 0
    """Of order and draws."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        for name in ("lr", "weight_decay", "clip", "lora_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be 0 or more")
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} is {getattr(self, name)}: it must lie between 0 and 1")
        require_at_least_one(self, "micro_tokens")
        if self.lora_rank < 0:
            raise UserError(f"--lora-rank is {self.lora_rank}: it must be 0 (off) or more")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed is {self.seed}: it must lie between 0 and 2^64 - 1")


@dataclass
class SFTCommand:
    """Fine-tune a model on conversations: only what the assistant wrote is learnt, end-of-text included."""

    model: Model
    tune: Annotated[TuneOptions, tyro.conf.arg(name="")] = field(default_factory=TuneOptions)
    folder: Annotated[RunFolderOptions, tyro.conf.arg(name="")] = field(default_factory=RunFolderOptions)
    machine: Annotated[MachineOptions, tyro.conf.arg(name="")] = field(default_factory=MachineOptions)
    data: tuple[str, ...] = ()
    """JSON Lines or Parquet files or folders: `messages` (OpenAI), `conversations` (ShareGPT), or `instruction` and `output` (Alpaca).
    Of a folder with `train*` and `val*` or `test*` files, the former."""
    chat_template: str | None = None
    """r1, v3.1 or a Jinja file; it is saved with the model and serves it. None: the model's own, or a plain one for a base model."""
    preview: int = 0
    """Show the first so many conversations token by token, what is learnt of them marked, and stop."""
    epochs: float = 1.0
    """Times that every conversation is seen, unless --steps says when to stop."""
    steps: int | None = None
    """Updates; None: as many as --epochs makes."""
    batch_tokens: int = 16384
    """Tokens of one update, at most; a longer conversation makes one by itself."""
    max_length: int | None = None
    """Conversations with more tokens are left out. None: what the model can read."""
    val_fraction: float = 0.02
    """Share of the conversations held out, to measure the loss on."""
    esft_share: float = 0.0
    """Train only the experts that this share of the data's routing goes to (expert-specialised fine-tuning); 0: everything."""
    mtp_weight: float = 0.1
    """Weight of the loss of multi-token prediction."""
    balance_speed: float = 0.001
    """Step of the routing bias after each update."""
    balance_loss: float = 1e-4
    """Weight of the balance loss."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        self.tune.validate()
        self.folder.validate()
        if not self.data:
            raise UserError("there is nothing to learn from: give --data PATH...")
        for name in ("mtp_weight", "balance_speed", "balance_loss", "preview"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be 0 or more")
        require_at_least_one(self, "batch_tokens", "steps", "max_length")
        if not 0 < self.epochs < math.inf:
            raise UserError(f"--epochs is {self.epochs}: it must be more than 0")
        for name in ("val_fraction", "esft_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be 0 or more and less than 1")
        if self.esft_share and self.tune.lora_rank:
            raise UserError("--esft-share and --lora-rank contradict each other: give one of them")
        if self.esft_share and self.tune.weight_decay:
            raise UserError("--esft-share leaves most experts as they are, and --weight-decay changes all of them: give one of the two")


@dataclass
class PolicyOptions:
    """The policy loss."""

    clip_low: float = 0.2
    """A token that has become less likely by more than this share of what it was sampled with is left alone."""
    clip_high: float = 0.28
    """The same for one that has become more likely."""
    kl: float = 0.0
    """Weight of the divergence from the model that the run started with; 0: none, and no copy of that model in memory."""
    off_policy_limit: float = 0.0
    """Leave out a reply with negative advantage where the policy has become less likely to write it by more nats a token than
    this; 0: never."""
    divide_by_std: bool = False
    """Measure advantages in deviations of their group, as GRPO first did: it favours problems that are nearly always or never solved."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        for name in ("clip_low", "clip_high", "kl", "off_policy_limit"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be 0 or more")


@dataclass
class GRPOCommand:
    """Improve a chat model by reinforcement: it answers problems, and answers better than their group's mean become more likely."""

    model: Model
    tune: Annotated[TuneOptions, tyro.conf.arg(name="")] = field(default_factory=lambda: TuneOptions(lr=3e-5))
    policy: Annotated[PolicyOptions, tyro.conf.arg(name="")] = field(default_factory=PolicyOptions)
    folder: Annotated[RunFolderOptions, tyro.conf.arg(name="")] = field(default_factory=RunFolderOptions)
    machine: Annotated[MachineOptions, tyro.conf.arg(name="")] = field(default_factory=MachineOptions)
    tasks: tuple[str, ...] = ()
    """arithmetic, countdown, sorting, strings (also NAME:DIFFICULTY or NAME:FROM-TO), gsm8k=FILE, humaneval=FILE; of a
    file, one problem in eight is held out."""
    data: str | None = None
    """A JSON Lines or Parquet file of problems with `prompt` (or `question`) and `answer`; one in eight is held out."""
    rewards: tuple[str, ...] = ("exact",)
    """What replies to --data are worth: exact, numeric, form, pattern, brevity, code, or a function of your own as FILE.py:NAME or
    MODULE:NAME, called with (prompt, reply, answer) in a sandbox; each with *WEIGHT if it is not 1. They are added."""
    steps: int = 100
    """Rounds of answering and learning."""
    prompts: int = 32
    """Problems of one step."""
    group: int = 8
    """Replies to every problem."""
    updates: int = 1
    """Updates of the weights per step, each on its share of the problems."""
    max_tokens: int = 256
    """Of a reply."""
    thinking: bool = False
    """Have replies begin with a thought, where the chat template leaves the choice (v3.1)."""
    overlong: Literal["mask", "keep"] = "mask"
    """`mask` learns nothing from replies that were cut off; `keep` takes their reward (0 without an answer) as it is."""
    routing_replay: bool = True
    """Train with the experts that sampling chose."""
    eval_every: int = 10
    """Steps between evaluations on held-out problems; 0: only before and after."""
    eval_problems: int = 200
    """Held-out problems of every task."""
    max_running: int = 128
    """Replies that are written at the same time."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        self.tune.validate()
        self.folder.validate()
        self.policy.validate()
        require_at_least_one(self, "steps", "prompts", "updates", "max_tokens", "max_running", "eval_problems")
        if self.group < 2:
            raise UserError(f"--group is {self.group}: a reply is judged against others, so it must be at least 2")
        if self.prompts % self.updates:
            raise UserError(f"--updates {self.updates} does not divide --prompts {self.prompts}: choose a divisor")
        if not self.tasks and self.data is None:
            raise UserError("there is nothing to learn: give --tasks NAME... or --data FILE")
        sources = len(self.tasks) + (self.data is not None)
        if self.prompts < sources:
            raise UserError(f"--prompts is {self.prompts}: with {sources} tasks it must be at least that many")
        if self.eval_every < 0:
            raise UserError(f"--eval-every is {self.eval_every}: it must be 0 or more")


@dataclass
class DPOCommand:
    """Fine-tune a chat model on pairs of answers, of which one was preferred (2305.18290)."""

    model: Model
    tune: Annotated[TuneOptions, tyro.conf.arg(name="")] = field(default_factory=lambda: TuneOptions(lr=1e-5))
    folder: Annotated[RunFolderOptions, tyro.conf.arg(name="")] = field(default_factory=RunFolderOptions)
    machine: Annotated[MachineOptions, tyro.conf.arg(name="")] = field(default_factory=MachineOptions)
    data: tuple[str, ...] = ()
    """JSON Lines or Parquet files or folders: `prompt` or `question`, `chosen` and `rejected` (each text or messages). Of a folder with
    `train*` and `val*` or `test*` files, the former."""
    beta: float = 0.1
    """How strongly the model is held to the one it starts from."""
    epochs: float = 1.0
    """Times that every pair is seen, unless --steps says when to stop."""
    steps: int | None = None
    """Updates; None: as many as --epochs makes."""
    pairs: int = 32
    """Pairs of one update."""
    max_length: int | None = None
    """Pairs of which an answer with its prompt has more tokens are left out. None: what the model can read."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        self.tune.validate()
        self.folder.validate()
        if not self.data:
            raise UserError("there is nothing to learn from: give --data PATH...")
        if not 0 < self.beta < math.inf:
            raise UserError(f"--beta is {self.beta}: it must be more than 0")
        if not 0 < self.epochs < math.inf:
            raise UserError(f"--epochs is {self.epochs}: it must be more than 0")
        require_at_least_one(self, "pairs", "steps", "max_length")


@dataclass
class ReasoningCommand:
    """Teach a small model to think: pretrain it on worked problems, fine-tune it on answers of which few show their work, then
    let it find out by reinforcement what helps. Ends with a plot and a summary."""

    folder: Annotated[RunFolderOptions, tyro.conf.arg(name="")] = field(default_factory=RunFolderOptions)
    machine: Annotated[MachineOptions, tyro.conf.arg(name="")] = field(default_factory=MachineOptions)
    base: str | None = None
    """A pretrained model to begin with, such as the folder `base` of an earlier run, instead of pretraining one."""
    pretrain_tokens: int = 9_000_000
    """Tokens of worked problems."""
    demonstrations: int = 24_000
    """Conversations to fine-tune on."""
    openness: float = 0.25
    """Share of them that shows its work."""
    steps: int = 80
    """Of reinforcement."""
    prompts: int = 32
    """Problems of one step."""
    group: int = 8
    """Replies to every problem."""
    max_tokens: int = 256
    """Of a reply."""
    eval_problems: int = 200
    """Held-out problems of each task."""
    seed: int = 0
    """Of problems, weights and draws."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        require_at_least_one(self, "pretrain_tokens", "demonstrations", "steps", "prompts", "max_tokens", "eval_problems")
        if not 0 < self.openness < 1:
            raise UserError(f"--openness is {self.openness}: it must lie between 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}: it must lie between 0 and 2^32 - 1")
