"""Code and reward functions that misbehave cost one sample its reward, not the run."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import UserError
from shoal.post.rewards import Judge, brevity, code, exact, form, number_in, numeric, pattern
from shoal.post.sandbox import Function, Limits, runs_to_end

QUICK = Limits(seconds=1.0, memory=512 << 20)
BAD = {
    "raises": "raise ValueError",
    "leaves early": "import sys; sys.exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "hangs": "while True: pass",
    "sleeps": "import time; time.sleep(60)",
    "allocates": "x = [0] * 10**9",
    "grows": "x = []\nwhile True: x.append(bytes(10**7))",
    "forks": "import os; os.fork()",
    "starts a program": "import subprocess; subprocess.run(['true'])",
    "opens a socket": "import socket; socket.create_connection(('127.0.0.1', 22))",
    "makes a socket": "import socket; socket.socket()",
    "writes a file": "open('/tmp/shoal-sandbox-test', 'w').write('x')",
    "deletes a file": "import os; os.remove(VICTIM)",
    "kills its parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "is no Python": "def f(:",
    "recurses": "def f(): f()\nf()",
}


@pytest.mark.parametrize("what", BAD)
def test_bad_code_fails_and_does_no_harm(what: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("here")
    began = time.monotonic()
    assert not runs_to_end(BAD[what].replace("VICTIM", repr(str(victim))), QUICK)
    assert time.monotonic() - began < 5
    assert victim.exists()
    assert not Path("/tmp/shoal-sandbox-test").exists()


def test_honest_code_runs() -> None:
    honest = "import math, re, threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\nassert math.pi > 3\nprint('a' * 10**6)"
    assert runs_to_end(honest, Limits(seconds=10.0, memory=512 << 20))


REWARDS = """
import os, time
CALLS = 0
def reward(prompt, reply, answer):
    global CALLS
    CALLS += 1
    if reply == "raise":
        raise RuntimeError("no")
    if reply == "hang":
        while True: pass
    if reply == "fork":
        while True: os.fork()
    if reply == "allocate":
        x = []
        while True: x.append(bytes(10**7))
    if reply == "leave":
        os._exit(0)
    if reply == "print":
        print("noise")
    return len(reply) + (prompt == "p") + (answer == "a")
"""


def test_a_users_function_that_fails_costs_one_call(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    with Function(f"{tmp_path / 'mine.py'}:reward", Limits(seconds=1.0, memory=512 << 20)) as function:
        for reply in ("raise", "hang", "fork", "allocate", "leave", "print"):
            result = function.call(prompt="p", reply=reply, answer="a")
            assert result == 7.0 if reply == "print" else isinstance(result, str), reply
            assert function.call(prompt="p", reply="fine", answer="a") == 6.0


def test_a_judge_adds_rewards_and_counts_what_was_lost(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    with Judge(["exact", "form*0.5", f"{tmp_path / 'mine.py'}:reward*0.1"]) as judge:
        assert judge("p", "<think>x</think>a", "a") == pytest.approx(1 + 0.5 + 0.1 * 19)
        assert judge("p", "raise", "a") == 0
        assert judge.failures == {"RuntimeError: no": 1}
    with Judge(["nowhere.py:f"]) as judge:
        assert judge("p", "r", "a") == 0
        assert list(judge.failures) == ["nowhere.py:f cannot be loaded"]


@pytest.mark.parametrize("spec", ["nonsense", "exact*x"])
def test_rewards_that_do_not_exist_are_refused(spec: str) -> None:
    with pytest.raises(UserError):
        Judge([spec])


def test_rewards_grade_what_they_say() -> None:
    assert exact("", "<think>5</think> Forty two.", "forty  Two") == 1
    assert exact("", "<think>42", "42") == 0
    assert numeric("", "so the answer is $1,234.50, not 7", "1234.5") == 1
    assert numeric("", r"7 and \boxed{1/2} or 9", "0.5") == 1
    assert numeric("", "3 then 4", "#### 4") == 1
    assert number_in("no digits") is None
    assert form("", "<think>a</think>b", "") == 1
    assert form("", "<think></think>b", "") == form("", "b", "") == form("", "<think>a</think>", "") == 0
    assert pattern("", "<think>a</think>ab12", r"[a-z]+\\d+".replace("\\\\", "\\")) == 1
    assert pattern("", "x", "(") == 0
    assert brevity("", "", "") == 1 > brevity("", "long " * 999, "")
    good = "<think>t</think>Here:\n```python\ndef f(x):\n    return x + 1\n```"
    assert code("", good, "assert f(1) == 2") == 1
    assert code("", good, "assert f(1) == 3") == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"6, so \boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{-\dfrac{3}{4}}", "-3/4"),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{\text{12 apples}}", "12"),
        (r"\boxed{5}. No, \boxed{\$7}", "7"),
        ("The answer is 12 * 5 = 60.", "60"),
        ("The answer is $12 * 5 = $60", "60"),
        ("The answer is (3 + 4) * 2 = 14", "14"),
        ("The answer is 7 (= 3 + 4)", "7"),
        ("The answer is 7 = 3 + 4", "7"),
        ("The answer is x = 4", "4"),
        ("answer is 5, since 2 + 3 = 5 and not 6", "5"),
        ("-$5", "-5"),
        ("the answer is \N{MINUS SIGN}5", "-5"),
        (".5", "1/2"),
        ("-.5", "-1/2"),
        ("so 10-3 is 7-0", "0"),
        ("x=-3", "-3"),
        ("one of 1,2,3", "3"),
        ("#### $1,234.50", "1234.5"),
        ("18.", "18"),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, number: str) -> None:
    assert number_in(text) == Fraction(number)


@given(st.text("\\boxed{frac}{}$-,.=/()0123 ", max_size=60))
def test_whatever_is_written_is_a_number_or_none(text: str) -> None:
    assert number_in(text) is None or isinstance(number_in(text), Fraction)


def test_an_expression_that_explodes_costs_its_reward() -> None:
    assert pattern("", "a" * 40 + "b", "(a+)+") == 0
