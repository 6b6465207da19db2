"""Training with counted n-grams: as a prior of the model, and as a teacher."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.cli import main
from shoal.config import TeacherConfig, TrainConfig, UserError
from shoal.config.recipes import load_recipe
from shoal.data import Batches, Tokenizer, TokenShards
from shoal.formats.checkpoints import complete_checkpoints
from shoal.formats.huggingface import load_model
from shoal.model import Transformer
from shoal.train import Trained, train
from shoal.train.counting import LONG, PIECE, UNEVEN, AlternatingBatches, Counting, Teacher, counts_while_training, halves, in_pieces
from shoal.train.optimizer import Optimizers

Args = Callable[..., list[str]]
Resumed = Callable[[TrainConfig], tuple[Trained, Trained]]


def shards(*lengths: int) -> TokenShards:
    """Documents of different tokens: 0, 0, ..., 1, 1, ..."""
    return TokenShards(
        np.repeat(np.arange(len(lengths), dtype=np.uint16), lengths), np.cumsum([0, *lengths]), np.array(lengths, dtype=np.int64)
    )


def with_counts(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, model=replace(config.model, count_order=3), **changes)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), min_size=2, max_size=60))
def test_halves_part_the_documents_evenly_and_leave_equal_ones_together(documents: list[tuple[int, int]]) -> None:
    assume(len({*documents}) > 1)
    texts = [np.full(length, token, np.uint16) for token, length in documents]
    text = TokenShards(np.concatenate(texts), np.cumsum([0, *map(len, texts)]), np.array([length for _, length in documents]))
    found = [[half.document(i).tolist() for i in range(half.num_documents)] for half in halves(text)]
    assert sorted(found[0] + found[1]) == sorted(map(np.ndarray.tolist, texts))
    assert not {*map(tuple, found[0])} & {*map(tuple, found[1])}, "one half would know what the other is asked"
    together = Counter(map(tuple, found[0] + found[1]))
    largest = max(len(document) * count for document, count in together.items())
    assert abs(sum(map(len, found[0])) - sum(map(len, found[1]))) <= largest + UNEVEN * text.num_tokens


def test_no_document_is_both_counted_and_studied(config: TrainConfig) -> None:
    one, other = halves(shards(*[5, 3, 1, 8, 2] * 20))
    assert {*one.tokens.tolist()} == {*range(0, 100, 2)}, "in turns where that is about even"
    assert {*other.tokens.tolist()} == {*range(1, 100, 2)}
    short, long = (half.num_tokens for half in halves(shards(*[1, 50] * 20)))
    assert abs(short - long) <= 50 + UNEVEN * 1020, "one kind of document and another, in turns"
    with pytest.raises(UserError, match=r"two documents that differ: .* shoal train default"):
        halves(shards(5))
    assert not counts_while_training(load_recipe("default")), "or the advice would lead back to the error"
    assert not counts_while_training(config)
    assert counts_while_training(with_counts(config))
    assert not counts_while_training(replace(config, model=replace(config.model, count_order=3, count_entries=7))), "it brings its counts"


def test_each_half_is_studied_with_the_counts_of_the_other(config: TrainConfig) -> None:
    text = shards(*[12] * 8)
    counting = Counting(with_counts(config), text)
    batches = AlternatingBatches(*(Batches(half, 6, 1, 0) for half in counting.texts), counting.study)
    token = (1 << counting.module.bits) - 1
    for turn in range(6):
        studied = {*batches.next().flatten().tolist()}
        known = {*(counting.module.entries & token).tolist()}
        assert studied <= {*counting.texts[turn % 2].tokens.tolist()}
        assert known == {*counting.texts[1 - turn % 2].tokens.tolist()}
    state = batches.state_dict()
    following = [batches.next().tolist() for _ in range(3)]
    batches.load_state_dict(state)
    assert [batches.next().tolist() for _ in range(3)] == following


def test_a_very_long_document_is_many() -> None:
    text = shards(7, LONG + PIECE + 1, LONG)
    pieces = in_pieces(text)
    assert pieces.documents.tolist() == [0, *range(7, 7 + LONG + PIECE + 1, PIECE), 8 + LONG + PIECE, 8 + 2 * LONG + PIECE]
    assert pieces.tokens is text.tokens


def test_a_prior_is_worth_a_lot_to_a_short_run_and_is_saved_with_it(config: TrainConfig) -> None:
    plain = train(replace(config, out=str(config.out) + "-plain"))
    run = train(with_counts(config))
    assert run.summary["val_bpb"] < 0.8 * plain.summary["val_bpb"]
    assert run.summary["counted_ngrams"] > 100
    assert run.summary["counting_seconds"] > 0 == plain.summary["counting_seconds"]
    early, last = (load_model(path) for path in complete_checkpoints(run.folder))
    assert early.model.counted is not None
    assert last.model.counted is not None
    assert len(early.model.counted.entries) < len(last.model.counted.entries) == run.summary["counted_ngrams"], "all text in the end"
    assert json.loads((complete_checkpoints(run.folder)[-1] / "config.json").read_text())["model_type"] == "shoal"


def test_a_teacher_leaves_a_plain_model_behind(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(replace(config, out=str(config.out) + "-plain"))
    faded, fade = [], Teacher.fade
    monkeypatch.setattr(Teacher, "fade", lambda teacher, tokens: faded.append(tokens) or fade(teacher, tokens))
    taught = train(replace(config, teacher=replace(config.teacher, order=3)))
    assert faded == [step * config.tokens_per_step for step in range(taught.summary["steps"])]
    assert taught.summary["val_bpb"] < plain.summary["val_bpb"]
    model = load_model(complete_checkpoints(taught.folder)[-1])
    assert model.state_dict().keys() == load_model(complete_checkpoints(plain.folder)[-1]).state_dict().keys()


def test_a_teacher_has_less_to_say_the_more_of_the_text_is_known() -> None:
    counting: Any = SimpleNamespace(texts=[SimpleNamespace(num_tokens=400), SimpleNamespace(num_tokens=600)])
    teacher, shares = Teacher(TeacherConfig(share=0.9, fade=0.1), counting), []
    for tokens in (0, 50, 110, 200, 1000, 10_000):
        teacher.fade(tokens)
        shares.append(teacher.share)
    assert shares == pytest.approx([0.9, 0.9, 0.9, 0.5, 0.1, 0.01])


@pytest.mark.parametrize("kind", ["prior", "teacher"])
def test_resumed_it_is_the_run_that_was_never_stopped(kind: str, config: TrainConfig, resumed: Resumed) -> None:
    config = with_counts(config) if kind == "prior" else replace(config, teacher=replace(config.teacher, order=3))
    whole, again = resumed(config)
    assert again.summary["val_bpb"] == whole.summary["val_bpb"]


def test_the_engine_predicts_what_the_model_predicts(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(with_counts(config))
    model = load_model(complete_checkpoints(run.folder)[-1]).eval()
    assert (
        main(
            [
                "generate",
                str(run.folder),
                "red green",
                "--max-tokens",
                "12",
                "--temperature",
                "0",
                "--ignore-eos",
                "--threads",
                "1",
                "--json",
            ]
        )
        == 0
    )
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokenizer = Tokenizer.load(complete_checkpoints(run.folder)[-1])
    ids = tokenizer.encode("red green")
    ids = ids if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]
    with torch.no_grad():
        for _ in range(12):
            output = model(torch.tensor([ids]))
            assert output.keys is not None
            ids.append(int(model.logits(output.hidden[0, -1:], output.keys[0, -1:]).argmax()))
    assert made["text"].strip() == tokenizer.decode(ids[-12:]).strip()


def test_a_text_too_large_to_count_is_refused_at_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.runtime.available_memory", lambda device: 10_000)
    with pytest.raises(UserError, match=r"counting n-grams of [\d,]+ tokens needs .* GB .* shoal train default"):
        train(with_counts(config))
    assert not Path(str(config.out)).exists()


def test_memory_to_count_all_of_the_text_at_the_end_is_asked_for_at_the_beginning(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the text is counted to begin with, for which there would be enough."""
    asked: list[float] = []
    monkeypatch.setattr("shoal.train.counting.require_memory", lambda needed, what, instead: asked.append(needed))
    train(with_counts(config, steps=1))

    def require(needed: float, what: str, instead: str) -> None:
        if needed > 0.9 * max(asked):
            raise UserError(f"{what} needs more memory: {instead}")

    monkeypatch.setattr("shoal.train.counting.require_memory", require)
    with pytest.raises(UserError, match="needs more memory"):
        train(with_counts(config, steps=1, out=f"{config.out}-2"))
    assert not Path(f"{config.out}-2").exists()


def test_a_run_that_is_stopped_at_its_last_step_ends_with_all_counts(
    config: TrainConfig, stopped_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    """What is saved when it stops has the counts of a half, and the same step as what is saved when it goes on, which takes no more."""
    counted = with_counts(config, steps=3)
    with stopped_after(3):
        assert not train(counted).finished
    summary = train(replace(counted, resume=True)).summary
    (last,) = complete_checkpoints(Path(str(config.out)))[-1:]
    assert load_model(last).config.count_entries == summary["counted_ngrams"]


def test_what_cannot_count_refuses(train_args: Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, complaint in (
        (["--teacher.order", "9"], "1 to 8"),
        (["--teacher.order", "2", "--model.count-order", "2"], "without counts"),
        (["--teacher.share", "1.5"], "between 0 and 1"),
        (["--teacher.fade", "0"], "more than 0"),
        (["--teacher.fade", "nan"], "more than 0"),
        (["--teacher.order", "2", "--memory-limit", "4G"], "name a recipe"),
        (["--teacher.order", "2", "--nproc", "2"], "by a single process"),
    ):
        assert main(train_args(tmp_path / "run", "--model.num-nextn-predict-layers", "0", *more)) == 2
        assert complaint in capsys.readouterr().err


def test_a_counted_model_does_not_start_on_the_text_that_it_knows(config: TrainConfig, workshop: Path, tmp_path: Path) -> None:
    first = train(with_counts(config, steps=2)).folder
    again = replace(config, steps=2, start=str(first), out=str(tmp_path / "again"))
    with pytest.raises(UserError, match="has counted this very text"):
        train(again)
    assert not (tmp_path / "again").exists()
    (tmp_path / "other.txt").write_text((workshop / "text.txt").read_text()[:-1000])
    assert train(replace(again, data=(str(tmp_path / "other.txt"),))).summary["steps"] == 2
    (first / "run.json").write_text('{"requested": {}}')  # as fine-tuning writes it
    assert train(replace(again, out=str(tmp_path / "tuned"))).summary["steps"] == 2
    assert train(replace(again, out=str(tmp_path / "tuned"), steps=3, resume=True)).summary["steps"] == 3, "its own text it does know"


def test_how_far_repetitions_are_trusted_does_not_decay(config: TrainConfig) -> None:
    model = Transformer(replace(config.model, repeat_window=32))
    optimizers = Optimizers(model, config.optimizer)
    decayed = {
        name
        for optimizer, names in zip(optimizers.all, optimizers.parameter_names(), strict=True)
        for name, decay in zip(names, [g["weight_decay"] for g in optimizer.param_groups for _ in g["params"]], strict=True)
        if decay
    }
    assert "model.layers.0.self_attn.o_proj.weight" in decayed
    assert not {name for name in decayed if "trust" in name}
