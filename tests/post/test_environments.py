"""Built-in problems: solvable, graded strictly, and never in both splits."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import UserError
from shoal.post.environments import ENVIRONMENTS
from shoal.post.expressions import Expression, Operation, numbers, parse, render, value, work_out
from shoal.post.problems import answer_of, problems, with_thought
from shoal.post.tasks import parse_task, pass_at

numbers_of_one = st.integers(0, 50).map(Fraction)
expressions = st.recursive(numbers_of_one, lambda inner: st.builds(Operation, st.sampled_from("+-*/"), inner, inner), max_leaves=6)


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right_and_thoughts_lead_to_them(name: str, split: str) -> None:
    environment, rng = ENVIRONMENTS[name], random.Random(0)
    for problem in islice(problems(environment, split, 0), 60):  # type: ignore[arg-type]
        assert environment.grade(problem, problem.answer) == 1
        reply = with_thought(environment.think(problem, rng), problem.answer)
        assert answer_of(reply) == problem.answer
        for wrong in ("", "I do not know", problem.answer + "1", "9" * 1000, "(" * 150, "__import__('os')", "1/0"):
            assert environment.grade(problem, wrong) == 0


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_no_problem_is_in_both_splits_whatever_the_seed(name: str) -> None:
    environment = ENVIRONMENTS[name]
    trained = {problem.key for seed in range(4) for problem in islice(problems(environment, "train", seed), 400)}
    tested = [problem.key for seed in range(2) for problem in islice(problems(environment, "test", seed), 100)]
    assert not trained & set(tested)
    assert len(set(tested[:100])) == 100


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_same_seed_gives_the_same_problems(name: str) -> None:
    environment = ENVIRONMENTS[name]
    assert list(islice(problems(environment, "train", 3), 20)) == list(islice(problems(environment, "train", 3), 20))
    assert list(islice(problems(environment, "train", 3), 20)) != list(islice(problems(environment, "train", 4), 20))


def test_countdown_wants_every_number_once() -> None:
    environment = ENVIRONMENTS["countdown"]
    problem = next(p for p in problems(environment, "train", 0) if len(set(p.facts[1:])) == 3)
    target, a = problem.facts[:2]
    assert environment.grade(problem, f"{problem.answer}={target}") == 1
    assert environment.grade(problem, str(target)) == 0
    assert environment.grade(problem, f"{problem.answer}+{a}-{a}") == 0
    assert environment.grade(problem, f"({problem.answer})*1") == 0


def test_an_exhausted_environment_says_so() -> None:
    with pytest.raises(UserError, match="no more than"):
        list(problems(ENVIRONMENTS["countdown"], "test", 0, range(2, 3)))


@given(expressions)
def test_expressions_read_back_as_they_were_written(expression: Expression) -> None:
    back = parse(render(expression))
    assert back is not None
    assert value(back) == value(expression)
    assert numbers(back) == numbers(expression)


@given(
    st.recursive(st.integers(1, 50).map(Fraction), lambda inner: st.builds(Operation, st.sampled_from("+*"), inner, inner), max_leaves=6)
)
def test_working_out_keeps_the_value(expression: Expression) -> None:
    lines = work_out(expression)
    assert {value(parse(line)) for line in lines} == {value(expression)}  # type: ignore[arg-type]
    assert len(lines) == len(numbers(expression))


def test_a_reply_whose_thought_does_not_end_has_no_answer() -> None:
    assert answer_of("<think>\n1+1=2") is None
    assert answer_of("42") == "42"
    assert answer_of("<think>a</think>b</think> 3") == "3"


@pytest.mark.parametrize("text", ["chess", "countdown:", "countdown:1", "countdown:5-3", "arithmetic:99", "gsm8k=/nowhere", "gsm8k"])
def test_tasks_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_task(text)


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one() -> None:
    assert pass_at(4, 0, 2) == 0
    assert pass_at(4, 4, 2) == 1
    assert pass_at(4, 1, 1) == 0.25
    assert pass_at(4, 1, 2) == 0.5
