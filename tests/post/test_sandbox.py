"""Code and reward functions that misbehave cost one sample its reward, not the run."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.alive import wait_for_end

from shoal.config import UserError
from shoal.post.confined import (
    ALLOW,
    CALLS,
    CONDITIONS,
    ERROR,
    JUMP_EQUAL,
    JUMP_GREATER_EQUAL,
    JUMP_SET,
    LOAD,
    MACHINES,
    RETURN,
    system_call_filter,
)
from shoal.post.rewards import Judge, brevity, code, code_in, exact, form, number_in, numeric, pattern
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
    "kills its parent by another call": "import ctypes, os; assert ctypes.CDLL(None).sigqueue(os.getppid(), 9, ctypes.c_void_p(0)) == 0",
    "asks for its parent to be signalled": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "binds its parent": "import os; os.sched_setaffinity(os.getppid(), os.sched_getaffinity(0))",
    "slows its parent": "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "dates a file": "import os; os.utime(VICTIM, (0, 0))",
    "labels a file": "import os; os.setxattr(VICTIM, 'user.a', b'x')",
    "changes a file's mode": "import os; os.chmod(VICTIM, 0o777)",
    "changes a file's mode by another call": "import ctypes; assert ctypes.CDLL(None).syscall(452, -100, VICTIM.encode(), 0o777, 0) == 0",
    "locks a file": "import fcntl; fcntl.flock(open(VICTIM), fcntl.LOCK_EX)",
    "leaves memory behind": "import ctypes; assert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0",
    "takes memory that is not counted": "import os; os.memfd_create('x')",
    "lifts its limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))",
    "reads what it is to say": """
import gc, re, sys
frame, texts = sys._getframe(), []
while frame:
    texts += [*frame.f_locals.values(), *frame.f_globals.values()]
    frame = frame.f_back
for thing in gc.get_objects():
    texts += list(thing.values()) if isinstance(thing, dict) else list(thing) if isinstance(thing, list | tuple) else []
assert any(isinstance(text, str) and re.fullmatch("[0-9a-f]{32}", text) for text in texts)
""",
    "is no Python": "def f(:",
    "recurses": "def f(): f()\nf()",
    "names a type that it does not import": "def f(n) -> List[int]: return [n]\nassert f(1) == [1]",
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


HONEST = """
import datetime, decimal, functools, hashlib, itertools, json, logging, math, os, random, re, signal, string, sys, time, typing, unittest
from concurrent.futures import ThreadPoolExecutor
assert math.pi > 3 and os.listdir("/") and open(os.devnull).read() == "" and not sys.stdin.read()
assert list(ThreadPoolExecutor(4).map(abs, range(9))) == list(range(9))
print("a" * 10**6, os.cpu_count(), os.getcwd(), os.getpid(), random.SystemRandom().random(), sys.stdout.isatty())
signal.alarm(5)
time.sleep(0.001)
numbers = list(range(10**6))
reader, writer = os.pipe()
os.write(writer, b"x")
assert os.read(reader, 1) == b"x"
"""


def test_honest_code_runs() -> None:
    assert runs_to_end(HONEST, Limits(seconds=10.0, memory=512 << 20))
    assert runs_to_end("import numpy\nassert (numpy.ones((99, 99)) @ numpy.ones((99, 99))).sum() == 99**3", Limits(seconds=10.0))


@pytest.mark.skipif(ctypes.CDLL(None).syscall(444, None, 0, 1) < 1, reason="this system has no Landlock")
def test_the_environment_of_other_processes_is_not_to_be_read() -> None:
    assert runs_to_end("assert open('/proc/self/environ').read()", Limits(seconds=10.0))
    for name in ("environ", "maps", "mem"):
        assert not runs_to_end(f"import os\nopen(f'/proc/{{os.getppid()}}/{name}')", QUICK), name


@pytest.mark.parametrize("machine", MACHINES)
def test_the_calls_have_their_numbers(machine: str) -> None:
    headers = {"x86_64": ["asm/unistd_64.h", "x86_64-linux-gnu/asm/unistd_64.h"], "aarch64": ["asm-generic/unistd.h"]}
    found = [path for name in headers[machine] if (path := Path("/usr/include") / name).is_file()]
    if not found:
        pytest.skip("the kernel's headers are not installed")
    source = found[0].read_text().replace("__NR3264_fstatat", "__NR_newfstatat")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", source))
    column = list(MACHINES).index(machine)
    assert {name: number[column] for name, number in CALLS.items()} == {
        name: int(numbers[name]) if name in numbers else None for name in CALLS
    }


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_allows_what_is_listed_and_nothing_else(machine: str) -> None:
    program = list(struct.iter_unpack("HBBI", system_call_filter(machine)))
    allowed = {numbers[list(MACHINES).index(machine)]: name for name, numbers in CALLS.items()}

    def verdict(number: int, *arguments: int, of: str = machine) -> int:
        words = struct.unpack("16I", struct.pack("=IIQ6Q", number, MACHINES[of], 0, *arguments, *[0] * (6 - len(arguments))))
        held, at = 0, 0
        while True:
            kind, met, failed, operand = program[at]
            at += 1
            if kind == RETURN:
                return operand
            if kind == LOAD:
                held = words[operand // 4]
            else:
                true = {JUMP_EQUAL: held == operand, JUMP_GREATER_EQUAL: held >= operand, JUMP_SET: bool(held & operand)}[kind]
                at += met if true else failed

    for number in range(600):
        if allowed.get(number) not in CONDITIONS:
            assert (verdict(number) == ALLOW) == (number in allowed), number
    number = {name: numbers[list(MACHINES).index(machine)] for name, numbers in CALLS.items()}
    cases: list[tuple[str, list[int], list[int]]] = [
        ("openat", [0, 0, os.O_RDONLY | os.O_CLOEXEC], [0, 0, os.O_WRONLY]),
        ("openat", [0, 0, os.O_RDONLY | os.O_DIRECTORY], [0, 0, os.O_RDONLY | os.O_TRUNC]),
        ("clone", [0x3D0F00], [17]),
        ("fcntl", [9, fcntl.F_DUPFD], [9, fcntl.F_SETOWN]),
        ("fcntl", [9, fcntl.F_DUPFD_CLOEXEC], [9, fcntl.F_SETLK]),
        ("ioctl", [9, 0x5451], [9, 0x5412]),
        ("prctl", [15], [22]),
        ("prlimit64", [0, 7, 0, 2**40], [1, 7, 0, 2**40]),
    ]
    for name, fine, refused in cases:
        assert verdict(number[name], *fine) == ALLOW, name  # type: ignore[arg-type]
        assert verdict(number[name], *refused) == ERROR | errno.EPERM, name  # type: ignore[arg-type]
    assert verdict(435) == verdict(0x40000000) == ERROR | errno.ENOSYS
    assert verdict(0, of=next(other for other in MACHINES if other != machine)) == ERROR | errno.EPERM


WAITING = """
import sys
from shoal.post.sandbox import Function, Limits, runs_to_end
print("here", flush=True)
if sys.argv[1] == "code":
    runs_to_end("import time; time.sleep(600)", Limits(600))
else:
    Function(sys.argv[1], Limits(600)).call(prompt="", reply="hang", answer="")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux has /proc")
@pytest.mark.parametrize("what", ["code", "function"])
def test_the_sandbox_ends_with_the_process_that_waits_for_it(what: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    where = "code" if what == "code" else f"{tmp_path / 'mine.py'}:reward"
    with subprocess.Popen([sys.executable, "-c", WAITING, where], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while not (children := children_of(process.pid)):
            time.sleep(0.02)
        time.sleep(0.5)  # the sandbox may be at work by now, or still be starting
        process.kill()
    wait_for_end(children, 10)


def children_of(parent: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((place / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(place.name))
    return found


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
    with contextlib.closing(Function(f"{tmp_path / 'mine.py'}:reward", Limits(seconds=1.0, memory=512 << 20))) as function:
        for reply in ("raise", "hang", "fork", "allocate", "leave", "print"):
            result = function.call(prompt="p", reply=reply, answer="a")
            assert result == 7.0 if reply == "print" else isinstance(result, str), reply
            assert function.call(prompt="p", reply="fine", answer="a") == 6.0


@pytest.mark.parametrize(
    "source",
    [
        "from helper import ONE\ndef reward(prompt, reply, answer): return ONE",
        """
from __future__ import annotations
import pickle
from dataclasses import dataclass
@dataclass
class Worth:
    value: float
def reward(prompt, reply, answer):
    return pickle.loads(pickle.dumps(Worth(1.0))).value
""",
    ],
)
def test_a_users_file_is_loaded_as_python_loads_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / "helper.py").write_text("ONE = 1.0")
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    for place in ("mine.py", str(tmp_path / "mine.py")):
        with contextlib.closing(Function(f"{place}:reward", Limits())) as function:
            assert function.call(prompt="", reply="", answer="") == 1.0


def test_a_judge_adds_rewards_and_counts_what_was_lost(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    with Judge(["exact", "form*0.5", f"{tmp_path / 'mine.py'}:reward*0.1"]) as judge:
        assert judge("p", "<think>x</think>a", "a") == pytest.approx(1 + 0.5 + 0.1 * 19)
        assert judge("p", "raise", "a") == 0
        assert judge.failures == {"RuntimeError: no": 1}


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        (REWARDS, "rewrad", "has no attribute 'rewrad'"),
        (REWARDS, "CALLS", "is not a callable"),
        ("def reward(reply, answer): return 1", "reward", "unexpected keyword argument 'prompt'"),
        ("import nothing_of_that_name", "reward", "No module named"),
        ("raise SystemExit", "reward", "it ends"),
        (None, "reward", "No such file"),
    ],
)
def test_functions_that_cannot_be_called_are_refused_before_anything_is_judged(
    tmp_path: Path, source: str | None, name: str, says: str
) -> None:
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=says), Judge([f"{tmp_path / 'mine.py'}:{name}"]):
        pass


@pytest.mark.parametrize("spec", ["nonsense", "exact*x", "exact*nan", "form*-inf"])
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


@given(
    st.lists(
        st.tuples(st.sampled_from(["bash", "text", "python", "Python", "python3", "py", "json title=x"]), st.integers(0, 2)), max_size=5
    )
)
def test_the_last_block_of_python_is_the_code_whatever_stands_around_it(blocks: list[tuple[str, int]]) -> None:
    reply, wanted = "", None
    for number, (language, indent) in enumerate(blocks):
        content = f"x = {number}\n    ```\n    of a docstring\n    ```\n"
        reply += f"Look:\n{' ' * indent}```{language}\n{content}{' ' * indent}```\n"
        wanted = content if language.lower().startswith("py") else wanted
    assert code_in(f"{reply}Done.") == (wanted or f"{reply}Done.")


def test_what_the_code_prints_is_not_taken_for_the_code() -> None:
    assert code_in("```python\nprint(1)\n```\nIt prints:\n```\n1\n```") == "print(1)\n"
    assert code_in("```bash\nls\n```\n```\nprint(1)\n```") == "print(1)\n"
    assert code_in("````python\nx = 1\n```\n````") == "x = 1\n```\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"6, so \boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{-\dfrac{3}{4}}", "-3/4"),
        (r"\boxed{\frac12}", "1/2"),
        (r"\boxed{-\tfrac{1}2}", "-1/2"),
        (r"\boxed{\frac 1{20}}", "1/20"),
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
