"""What runs inside the sandbox: a program of its own that first takes rights away from itself, then runs the code it is given.

It reads its orders from standard input as JSON and answers on the descriptor it was given as standard output. It imports nothing
of Shoal, because it is started by path in an interpreter of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import importlib
import importlib.util
import io
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

# Linux system calls by number, on x86-64 and on AArch64 (None: it has no such call). What is not here is refused.
CALLS: dict[str, tuple[int, int | None]] = {
    # memory
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233),
    "msync": (26, 227), "membarrier": (324, 283),
    # files, to be read; `open` and `openat` in part
    "open": (2, None), "openat": (257, 56), "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "preadv": (295, 69),
    "preadv2": (327, 286), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436), "stat": (4, None), "lstat": (6, None),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "statfs": (137, 43), "fstatfs": (138, 44), "fadvise64": (221, 223),
    # what is open already; `fcntl` and `ioctl` in part
    "write": (1, 64), "writev": (20, 66), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "eventfd2": (290, 19), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "fcntl": (72, 25), "ioctl": (16, 29),
    # threads; `clone` and `prctl` in part
    "clone": (56, 220), "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "gettid": (186, 178), "getcpu": (309, 168), "prctl": (157, 167),
    "exit": (60, 93), "exit_group": (231, 94),
    # time
    "time": (201, None), "gettimeofday": (96, 169), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "times": (100, 153), "getrusage": (98, 165), "alarm": (37, None),
    "getitimer": (36, 102), "setitimer": (38, 103), "pause": (34, None),
    # how its own signals are received
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    # who and where it is; `prlimit64` in part
    "getpid": (39, 172), "getppid": (110, 173), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148),
    "getresgid": (120, 150), "getgroups": (115, 158), "getrlimit": (97, 163), "prlimit64": (302, 261), "uname": (63, 160),
    "sysinfo": (99, 179), "getrandom": (318, 278),
}  # fmt: skip
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Their numbers in audit.h, in the order of the numbers of calls."""
NEWEST = 424
"""Calls from this number on are "not there" rather than refused, so that libraries use the older ones (`clone` for `clone3`)."""

LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, ERROR = 0x7FFF0000, 0x00050000
PR_SET_PDEATHSIG, PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 15, 16, 22, 38, 2
CLONE_THREAD = 0x10000
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EVERY_BIT = 0xFFFFFFFF
DESCRIPTORS = (fcntl.F_DUPFD, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_DUPFD_CLOEXEC)
"""What `fcntl` may do: not lock files, nor have signals sent to the owner of one."""
TERMINALS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: what `ioctl` may do."""

Condition = tuple[int, int, tuple[int, ...], bool]
"""Word of the arguments (the lower half of argument i is word 2 i), JUMP_EQUAL or JUMP_SET, operands, and whether one is to match."""
CONDITIONS: dict[str, Condition] = {
    "open": (2, JUMP_SET, (WRITES,), False),
    "openat": (4, JUMP_SET, (WRITES,), False),
    "clone": (0, JUMP_SET, (CLONE_THREAD,), True),
    "fcntl": (2, JUMP_EQUAL, DESCRIPTORS, True),
    "ioctl": (2, JUMP_EQUAL, TERMINALS, True),
    "prctl": (0, JUMP_EQUAL, (PR_SET_NAME, PR_GET_NAME), True),
    "prlimit64": (0, JUMP_SET, (EVERY_BIT,), False),  # of no other process
}

CAPABILITIES = 0x20080522
"""Version 3 of capget and capset."""
READING = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: of what root may do, to read files."""
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
LANDLOCK_CHANGES = 0x1FF3
"""All rights over files of Landlock's first version but reading."""
FILE_MODULE = "__reward__"
"""What a user's file is called as a module: like no other that it may import."""


def system_call_filter(machine: str) -> bytes:
    """A BPF program: memory, threads and reading are fine; no network, no new processes, no signals, nothing written or changed on disk."""
    program: list[tuple[int, int, int, int]] = [
        (LOAD, 0, 0, 4),  # seccomp_data.arch
        (JUMP_EQUAL, 1, 0, MACHINES[machine]),
        (RETURN, 0, 0, ERROR | errno.EPERM),
        (LOAD, 0, 0, 0),  # the number of the call
    ]
    for name, numbers in CALLS.items():
        number = numbers[list(MACHINES).index(machine)]
        if number is not None:
            body = _refuse_unless(*CONDITIONS[name]) if name in CONDITIONS else []
            program += [(JUMP_EQUAL, 0, len(body) + 1, number), *body, (RETURN, 0, 0, ALLOW)]
    program += [(JUMP_GREATER_EQUAL, 0, 1, NEWEST), (RETURN, 0, 0, ERROR | errno.ENOSYS), (RETURN, 0, 0, ERROR | errno.EPERM)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _refuse_unless(word: int, jump: int, operands: tuple[int, ...], wanted: bool) -> list[tuple[int, int, int, int]]:
    """Instructions that end with EPERM or go on, see `Condition`."""
    tests, last = [], len(operands) - 1
    for i, operand in enumerate(operands):
        met, failed = (last - i + wanted, 0) if i < last else (int(wanted), int(not wanted))
        tests.append((jump, met, failed, operand))
    return [(LOAD, 0, 0, 16 + 4 * word), *tests, (RETURN, 0, 0, ERROR | errno.EPERM)]


def end_with(parent: int) -> None:
    """Have the system kill this process when `parent` ends, by whatever signal; only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        sys.exit(1)


def confine(seconds: float, memory: int) -> None:
    """Give up what honest code does not need. Raises `OSError` where the system does not let us; there is no filter off Linux."""
    cpu = max(1, math.ceil(seconds))
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        return
    code = system_call_filter(machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    # Sets of rights: effective, permitted, inheritable, then the upper halves of all three.
    header, sets = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    failed = libc.capget(header, sets)
    kept = sets[1] & READING
    if failed or libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept)) or libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "privileges cannot be given up")
    # Where Landlock is there (Linux 5.13), /proc shows nothing of the memory and the environment of processes outside.
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(ctypes.c_uint64(LANDLOCK_CHANGES)), ctypes.c_size_t(8), 0)
    if rules >= 0:
        libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0)
        os.close(rules)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "the system calls cannot be limited")


def load_function(where: str) -> Callable[..., Any]:
    """`FILE.py:NAME` or `MODULE:NAME`."""
    import inspect  # takes longer than all that a program without a function needs

    source, _, name = where.rpartition(":")
    if source.endswith(".py"):
        spec = importlib.util.spec_from_file_location(FILE_MODULE, source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # As for a program: what lies beside it can be imported, and its classes are found by their module's name.
        sys.path.insert(0, os.path.dirname(os.path.abspath(source)))
        sys.modules[FILE_MODULE] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    found: Callable[..., Any] = getattr(module, name)
    with contextlib.suppress(ValueError):  # some functions in C do not say what they take
        inspect.signature(found).bind(prompt="", reply="", answer="")
    return found


def main() -> None:
    """One line of orders `{"parent", "seconds", "memory", "code" | "function"}`; then, with code, what to say at its end, or a line of
    arguments for every call of the function."""
    lines = open(os.dup(0), "rb", buffering=0)  # noqa: SIM115  unbuffered: what comes later stays outside of memory until then
    answers = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    orders = json.loads(lines.readline())
    end_with(orders["parent"])

    def answer(value: Any) -> None:
        os.write(answers, json.dumps(value).encode() + b"\n")

    if "code" in orders:
        confine(orders["seconds"], orders["memory"])
        # This file's own `from __future__` is not to hold for the code: it would not look at annotations.
        exec(compile(orders["code"], "<reply>", "exec", dont_inherit=True), {"__name__": "__main__"})
        answer(json.loads(lines.readline()))  # leaving early, exit code 0 or not, does not get here
        return
    try:
        function = load_function(orders["function"])
    except Exception as error:
        answer(_described(error))
        return
    # What loading threads or a large library took is not the code's fault: limits count from here.
    confine(orders["seconds"], orders["memory"])
    answer("ready")
    for line in io.BufferedReader(lines):
        try:
            answer(float(function(**json.loads(line))))
        except Exception as error:
            answer(_described(error))


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


if __name__ == "__main__":
    main()
