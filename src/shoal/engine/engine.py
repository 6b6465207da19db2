"""The engine: requests in, answers out, step by step.

The walk of a step: scheduler -> batch -> runner -> logits -> sampling -> text -> guesses -> pages for others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import CacheFormat, EngineOptions, SamplingOptions, UserError
from ..data import Tokenizer
from ..runtime import available_memory
from .answer import Answer, stop_set
from .batch import PAGE, Batch
from .pages import PagePool
from .race import Room
from .requests import Increment, Request, Result, TokenMask
from .runner import DTYPES, Forward, Runner, on_host
from .sampling import Rows, Sampler, SamplingError
from .scheduler import Limits, Scheduler, Sequence, Work
from .speculate import Drafter, Switch, keep_behind

SCORED_AT_ONCE = 64
"""Positions of a prompt whose logits are held at the same time."""
COUNTED_AT_ONCE = 32
"""Steps after which experts are counted; earlier where nothing is left to do."""
MEMORY_SHARE = 0.25
"""Of the free memory that the cache takes at most unless its size is given."""


@dataclass
class EngineStats:
    """Where the engine stands; counts are since its start."""

    waiting: int = 0
    running: int = 0
    pages: int = 0
    pages_in_use: int = 0
    pages_known: int = 0
    """To the prefix cache, in use or not."""
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts, found in the prefix cache."""
    generated_tokens: int = 0
    drafted_tokens: int = 0
    """Guesses that were checked."""
    accepted_tokens: int = 0
    """Guesses that were right."""
    guesses: bool = False
    """Whether the last step was followed by guesses."""
    finished: Counter[str] = field(default_factory=Counter)
    """By reason."""
    expert_load: np.ndarray | None = None
    """`[MoE layers, E]`: tokens sent to every expert of the main model; None if it has none. While requests run, the last steps
    may be missing."""

    @property
    def acceptance(self) -> float | None:
        """Share of guesses that were right; None before the first."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def hit_rate(self) -> float | None:
        """Share of prompt tokens found in the prefix cache; None before the first."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None


class Engine:
    """Serves many requests at once with one runner. Not thread-safe: see `AsyncEngine`.

    Without a `tokenizer`, answers hold tokens and no text. `make_mask` is for its worker: it makes the masks of requests that bring none,
    but plain data to make it of.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
        make_mask: Callable[[Any], TokenMask] | None = None,
    ) -> None:
        options = options or EngineOptions()
        options.validate()
        self.runner, self.tokenizer, self.options = runner, tokenizer, options
        self.context = runner.config.max_position_embeddings
        """Tokens of prompt and answer together, at most."""
        cache: CacheFormat = runner.natural_cache if options.cache == "auto" else options.cache
        pages = cache_pages(runner, options, cache)
        runner.allocate(pages, cache)
        speculates = options.speculate != "off" and runner.config.num_nextn_predict_layers > 0
        self._drafter = Drafter(runner) if speculates else None
        self._switch = Switch(options.speculate, options.draft_tokens)
        self._guesses = 0
        """Of every sequence, after the last step."""
        self._room = Room()
        self.pool = PagePool(pages, prefix_cache=options.prefix_cache, ahead=int(speculates))
        self.scheduler = Scheduler(self.pool, Limits(options.step_tokens, options.max_running), runner.copy_page)
        self._answers: dict[int, Answer] = {}
        self._numbers = 0
        self.make_mask = make_mask
        self._eos = stop_set(tokenizer, runner.config)
        self._stats = EngineStats(pages=pages)
        config = runner.config
        layers, experts = sum(map(config.is_moe_layer, range(config.num_hidden_layers))), config.n_routed_experts or 0
        if layers:
            self._stats.expert_load = np.zeros((layers, experts), np.int64)
        self._uncounted: list[np.ndarray] = []
        """Experts that were chosen in the last steps."""
        self._first_expert = experts * np.arange(layers)[:, None, None]

    @property
    def has_work(self) -> bool:
        return bool(self._answers)

    def add_request(self, request: Request) -> int:
        """Queue a request; returns its number. Raises `UserError` if it can never be served."""
        prompt, sampling = list(request.prompt), request.sampling
        sampling.validate(least_tokens=0)
        vocab_size = self.runner.config.vocab_size
        if not prompt:
            raise UserError("the prompt is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UserError(f"the prompt holds ids that are not in the vocabulary of {vocab_size}: use the model's own tokenizer")
        wanted = len(prompt) + min(sampling.max_tokens, 1)
        if wanted > self.context:
            raise UserError(f"the prompt has {len(prompt)} tokens, the model sees {self.context}: shorten it")
        if wanted > self.pool.pages * PAGE:
            room = self.pool.pages * PAGE
            raise UserError(f"the prompt has {len(prompt)} tokens, the cache holds {room}: shorten it or give more --cache-tokens")
        if sampling.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer: use stop_token_ids")
        limit = min(len(prompt) + sampling.max_tokens, self.context, self.pool.pages * PAGE)
        sampler = Sampler(sampling, prompt, vocab_size, self._eos, request.mask)
        sequence = Sequence(self._numbers, prompt, limit)
        answer = Answer(request, sequence, sampler, self.tokenizer, sampling.max_tokens)
        assert answer.prompt is not None
        sequence.reads_all = answer.prompt.reads_all
        self._numbers += 1
        self._answers[sequence.number] = answer
        self.scheduler.add(sequence)
        self._stats.prompt_tokens += len(prompt)
        return sequence.number

    def abort(self, number: int) -> Increment | None:
        """End a request and free its pages at once; what was still held back of its text. None if it had ended already."""
        answer = self._answers.get(number)
        if answer is None:
            return None
        answer.finish("abort")
        return self._close(answer)

    def step(self) -> dict[int, Increment]:
        """Compute one batch; what it added, by request. Nothing happens if there is nothing to do."""
        began = time.perf_counter()
        work = self.scheduler.schedule()
        if not work:
            return {}
        batch = _lay_out(work)
        forward = self.runner.forward(batch)
        starts: list[int] = batch.starts.tolist()
        if forward.experts is not None:
            self._uncounted.append(on_host(forward.experts))
        self._read_prompts(work, starts, forward)
        drafted, accepted = self._stats.drafted_tokens, self._stats.accepted_tokens
        made = self._choose(work, starts, forward)
        guesses = self._guess(work)
        increments = {}
        for sequence, _, _ in work:
            self.scheduler.publish(sequence)
            answer = self._answers[sequence.number]
            increment = self._close(answer) if answer.finish_reason else answer.take()
            if increment is not None:
                increments[sequence.number] = increment
        steady = self._drafter is not None and guesses == self._guesses
        if steady and made and all(share.length == 1 + share.drafts for share in work):
            checked, right = self._stats.drafted_tokens - drafted, self._stats.accepted_tokens - accepted
            self._switch.record(len(work), max(share.drafts for share in work), checked, right, time.perf_counter() - began)
        self._guesses, self._stats.guesses = guesses, guesses > 0
        self._stats.steps += 1
        if len(self._uncounted) == COUNTED_AT_ONCE:
            self._count_experts()
        self._stats.generated_tokens += made
        return increments

    def generate(self, prompts: Seq[str | Seq[int]], sampling: SamplingOptions | Seq[SamplingOptions] | None = None) -> list[Result]:
        """Answer all prompts (texts get the begin-of-text token that the tokenizer adds); the engine must have no other requests.

        Raises `UserError` before any work if one of them can never be served.
        """
        assert not self.has_work, "generate needs an engine without other requests"
        each = [sampling] * len(prompts) if sampling is None or isinstance(sampling, SamplingOptions) else list(sampling)
        requests = [
            Request(self.encode(prompt) if isinstance(prompt, str) else prompt, options or SamplingOptions())
            for prompt, options in zip(prompts, each, strict=True)
        ]
        return self.run(requests)

    def run(self, requests: Seq[Request]) -> list[Result]:
        """Serve all requests to their end; see `generate`."""
        results: dict[int, Result] = {}
        try:
            for request in requests:
                results[self.add_request(request)] = Result(len(request.prompt))
            while self.has_work:
                for number, increment in self.step().items():
                    results[number].add(increment)
        finally:
            for number in results:
                self.abort(number)
        return list(results.values())

    def score(self, texts: Seq[Seq[int]]) -> list[list[float]]:
        """Log-probability of every token but the first of every text (ids), given those before it."""
        options = SamplingOptions(max_tokens=0, prompt_logprobs=0)
        reports = [result.prompt.logprobs for result in self.run([Request(ids, options) for ids in texts])]
        return [[token.logprob for token in report[1:] if token.logprob is not None] for report in reports if report is not None]

    def embed(self, texts: Seq[Seq[int]]) -> np.ndarray:
        """Mean hidden state, after the final norm, of every text (ids): `[len(texts), D]` fp32."""
        results = self.run([Request(ids, SamplingOptions(max_tokens=0), embed=True) for ids in texts])
        return np.stack([result.prompt.embedding for result in results if result.prompt.embedding is not None])

    def encode(self, text: str) -> list[int]:
        """Ids of a text to continue. Raises `UserError` if there are none."""
        assert self.tokenizer is not None, "texts need a tokenizer"
        ids = self.tokenizer.encode(text, bos=True)
        if not ids:
            raise UserError("the prompt is empty and this tokenizer adds no begin-of-text token: give at least one character")
        return ids

    def stats(self) -> EngineStats:
        """A copy of the present figures; may be called from another thread."""
        figures = EngineStats(**vars(self._stats))
        figures.waiting, figures.running = len(self.scheduler.waiting), len(self.scheduler.running)
        figures.pages_in_use, figures.pages_known = self.pool.in_use, self.pool.known
        figures.preemptions = self.scheduler.preemptions
        figures.finished = Counter(self._stats.finished)
        if self._stats.expert_load is not None:
            figures.expert_load = self._stats.expert_load.copy()
        return figures

    def _read_prompts(self, work: list[Work], starts: list[int], forward: Forward) -> None:
        """Collect what requests want to know about their prompts."""
        for (sequence, length, drafts), start in zip(work, starts, strict=False):
            length -= drafts  # guesses of what follows the prompt are none of it
            builder = self._answers[sequence.number].prompt
            if builder is None:
                continue
            if builder.cached_tokens is None:
                builder.cached_tokens = sequence.computed
                self._stats.cached_tokens += sequence.computed
            if not builder.reads_all:
                continue
            if not sequence.computed:
                builder.restart()
            rows = slice(start, start + length)
            builder.add_hidden(on_host(forward.hidden[rows]))
            if forward.experts is not None:
                builder.add_experts(on_host(forward.experts[:, rows]).astype(np.int16))
            if builder.wants_logits:
                for first in range(start, start + length, SCORED_AT_ONCE):
                    part = range(first, min(first + SCORED_AT_ONCE, start + length))
                    builder.add_logits(on_host(self.runner.logits(*forward.predictions(part))))

    def _choose(self, work: list[Work], starts: list[int], forward: Forward) -> int:
        """Move every sequence on, choosing tokens for those that are computed to their end; number of tokens chosen."""
        choosing: list[tuple[Work, int]] = []
        rows: list[int] = []
        places: list[tuple[Sampler, int]] = []
        for share, start in zip(work, starts, strict=False):
            sequence = share.sequence
            if sequence.computed + share.length < len(sequence.tokens):
                self._move_on(sequence, forward, start, share.length)
                continue
            answer = self._answers[sequence.number]
            answer.prompt_is_read()
            if answer.finish_reason:
                sequence.computed += share.length
                continue
            choosing.append((share, start))
            rows.extend(range(start + share.length - 1 - share.drafts, start + share.length))
            places.extend((answer.sampler, len(sequence.tokens) + ahead) for ahead in range(1 + share.drafts))
        if not choosing:
            return 0
        logits = Rows(self.runner.logits(*forward.predictions(rows)), places, self._room)
        made = row = 0
        for share, start in choosing:
            chosen = self._extend(share, start, row, logits, forward)
            row += 1 + share.drafts
            made += chosen
        return made

    def _extend(self, share: Work, start: int, row: int, logits: Rows, forward: Forward) -> int:
        """Choose the next token of a sequence and, as long as guesses were right, those after it; their number."""
        sequence = share.sequence
        answer = self._answers[sequence.number]
        first = start + share.length - 1 - share.drafts
        guesses, sequence.drafts = sequence.drafts, []
        made = 0
        while True:
            guess = guesses[made] if made < share.drafts else None
            experts = None
            if answer.request.experts and forward.experts is not None:
                experts = on_host(forward.experts[:, first + made]).astype(np.int16)
            try:
                token = logits.choose(row + made)
                answer.extend(token, logits, row + made, guess, experts)
            except SamplingError as error:
                answer.finish("error", error=str(error))
                break
            except Exception as error:  # a grammar or a tokenizer failed: no reason to disturb other requests
                answer.finish("error", error=f"{type(error).__name__}: {error}")
                break
            made += 1
            if guess is not None:
                self._stats.drafted_tokens += 1
                self._stats.accepted_tokens += guess == token
            if answer.finish_reason or guess != token:
                break
        self._move_on(sequence, forward, start, share.length - share.drafts + max(made - 1, 0))
        return made

    def _move_on(self, sequence: Sequence, forward: Forward, start: int, count: int) -> None:
        """`count` more positions of `sequence` are computed: the rows from `start` on."""
        sequence.computed += count
        if self._drafter is not None:
            keep_behind(sequence, forward.hidden, start, count)

    def _guess(self, work: list[Work]) -> int:
        """Guess the tokens that follow, if that is expected to pay; how many of each sequence."""
        if self._drafter is None:
            return 0
        most = self._switch.guesses([sequence.number for sequence in self.scheduler.running if sequence.todo == 1])
        if most:
            answers = (self._answers[sequence.number] for sequence, _, _ in work)
            self._drafter.run([(answer.sequence, answer.sampler) for answer in answers if not answer.finish_reason], most)
        return most

    def _count_experts(self) -> None:
        """Those of the last steps, together: a count takes as long for one token as for a hundred."""
        load = self._stats.expert_load
        if load is not None and self._uncounted:
            # Experts of all layers numbered through, so that one count does for all.
            chosen = np.concatenate(self._uncounted, 1) + self._first_expert
            load += np.bincount(chosen.ravel(), minlength=load.size).reshape(load.shape)
        self._uncounted = []

    def _close(self, answer: Answer) -> Increment | None:
        """Forget a finished request; the last of its answer."""
        del self._answers[answer.sequence.number]
        if not self._answers:
            self._count_experts()
        self.scheduler.remove(answer.sequence)
        self._stats.finished[str(answer.finish_reason)] += 1
        return answer.take()


def _lay_out(work: list[Work]) -> Batch:
    ids, firsts = [], []
    for sequence, length, drafts in work:
        new = sequence.tokens[sequence.computed : sequence.computed + length - drafts]
        ids.append(new + sequence.drafts[:drafts] if drafts else new)
        firsts.append(sequence.computed)
    return Batch.lay_out(ids, firsts, [sequence.table for sequence, _, _ in work])


def cache_pages(runner: Runner, options: EngineOptions, cache: CacheFormat) -> int:
    """Number of pages: as asked, or one context for every running request, within the share of memory that is free."""
    if options.cache_tokens:
        return -(-options.cache_tokens // PAGE)
    config = runner.config
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    page = PAGE * layers * config.cache_values_per_token * DTYPES[cache].itemsize
    wanted = options.max_running * -(-config.max_position_embeddings // PAGE)
    return max(1, min(wanted, int(MEMORY_SHARE * available_memory(runner.device)) // page))
