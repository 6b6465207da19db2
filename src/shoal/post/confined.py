"""What runs inside the sandbox: a program of its own that first takes rights away from itself, then runs the code it is given.

It reads its orders from standard input as JSON and answers on the descriptor it was given as standard output. It imports nothing
of Shoal, because it is started by path in an interpreter of its own.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import importlib.util
import json
import math
import os
import platform
import resource
import struct
import sys
from collections.abc import Callable
from typing import Any

# Linux system calls by machine: those that are refused altogether, then those that are refused for some arguments.
REFUSED = {
    # socket, socketpair, fork, vfork, execve, ptrace, kill, truncate, rename, mkdir, rmdir, creat, link, unlink, symlink, chmod, fchmod,
    # chown, fchown, lchown, mknod, mount, tkill, tgkill, mkdirat, mknodat, fchownat, unlinkat, renameat, linkat, symlinkat, fchmodat,
    # process_vm_writev, renameat2, execveat, pidfd_send_signal, io_uring_setup, pidfd_open
    "x86_64": (
        *(41, 53, 57, 58, 59, 101, 62, 76, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 133, 165, 200, 234, 258, 259, 260, 263, 264),
        *(265, 266, 268, 311, 316, 322, 424, 425, 434),
    ),
    "aarch64": (198, 199, 221, 117, 129, 45, 52, 55, 40, 130, 131, 34, 33, 54, 35, 38, 37, 36, 53, 271, 276, 281, 424, 425, 434),
}
MISSING = (435, 437)
"""clone3 and openat2, whose arguments a filter cannot see: "not there", so that libraries use the older calls."""
CLONE = {"x86_64": 56, "aarch64": 220}
OPEN = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}
"""open and openat, and which argument holds the flags."""
PRLIMIT = {"x86_64": 302, "aarch64": 261}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE_THREAD = 0x10000
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
X32 = 0x40000000

LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, ERROR = 0x7FFF0000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


def system_call_filter(machine: str) -> bytes:
    """A BPF program: no network, no new processes, no signals, nothing written to disk; threads and reading are fine."""
    program: list[tuple[int, int, int, int]] = [
        (LOAD, 0, 0, 4),  # seccomp_data.arch
        (JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, ERROR | errno.EPERM),
        (LOAD, 0, 0, 0),  # the number of the call
        (JUMP_GREATER_EQUAL, 0, 1, X32),
        (RETURN, 0, 0, ERROR | errno.EPERM),
    ]
    for number, reason in [*((n, errno.EPERM) for n in REFUSED[machine]), *((n, errno.ENOSYS) for n in MISSING)]:
        program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ERROR | reason)]

    def by_argument(number: int, argument: int, mask: int, *, wanted: bool) -> None:
        """Allow a call if whether some bit of `mask` is set is as `wanted`."""
        yes, no = (ALLOW, ERROR | errno.EPERM) if wanted else (ERROR | errno.EPERM, ALLOW)
        program.extend(
            [(JUMP_EQUAL, 0, 4, number), (LOAD, 0, 0, 16 + 8 * argument), (JUMP_SET, 0, 1, mask), (RETURN, 0, 0, yes), (RETURN, 0, 0, no)]
        )

    by_argument(CLONE[machine], 0, CLONE_THREAD, wanted=True)
    for number, argument in OPEN[machine]:
        by_argument(number, argument, WRITES, wanted=False)
    by_argument(PRLIMIT[machine], 0, 0xFFFFFFFF, wanted=False)  # limits of other processes
    program.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


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
    if sys.platform != "linux" or machine not in AUDIT_ARCH:
        return
    code = system_call_filter(machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "the system calls cannot be limited")


def load_function(where: str) -> Callable[..., Any]:
    """`FILE.py:NAME` or `MODULE:NAME`."""
    source, _, name = where.rpartition(":")
    if source.endswith(".py"):
        spec = importlib.util.spec_from_file_location("reward", source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    found: Callable[..., Any] = getattr(module, name)
    return found


def main() -> None:
    """One line of orders `{"seconds", "memory", "code" | "function"}`; with a function, then one line of arguments for every call."""
    orders = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    function = load_function(orders["function"]) if "function" in orders else None
    # What loading threads or a large library took is not the code's fault: limits count from here.
    confine(orders["seconds"], orders["memory"])
    if function is None:
        secret = orders.pop("secret")
        exec(compile(orders.pop("code"), "<reply>", "exec"), {"__name__": "__main__"})
        answer(secret)  # leaving early, exit code 0 or not, does not get here
        return
    answer("ready")
    for line in sys.stdin:
        try:
            answer(float(function(**json.loads(line))))
        except Exception as error:
            answer(f"{type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    main()
