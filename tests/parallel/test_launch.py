"""Whom the launcher blames, and what is left of an error that only says that another process is gone."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import cast

import pytest
from torch.distributed import DistNetworkError

from shoal.config import UserError
from shoal.parallel.launch import INTERRUPTED, LOST_OTHERS, Member, _wait, ending_with_others

GLOO = (
    "[/build/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:3506: Connection reset by peer. This is typically caused by a "
    "remote worker hanging or bugs in the application."
)


def in_a_stage(cause: Exception) -> RuntimeError:
    """As a pipeline tells what went wrong in one of its stages."""
    error = RuntimeError("[Stage 1] failed to run forward: args: ('Tensor(torch.Size([4, 24]))',)")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (RuntimeError(GLOO), "Read error [127.0.0.1]:3506: Connection reset by peer"),
        (in_a_stage(RuntimeError(GLOO)), "Read error [127.0.0.1]:3506: Connection reset by peer"),
        (DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), "Failed to recv, got 0 bytes"),
    ],
)
def test_a_lost_connection_is_one_line(
    error: RuntimeError, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end, ending_with_others():
        raise error
    assert end.value.code == LOST_OTHERS
    assert capsys.readouterr().err == f"shoal: process 1 lost its connection to another one: {what}\n"


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), in_a_stage(ValueError("shapes do not fit"))])
def test_other_errors_are_not_hidden(error: RuntimeError) -> None:
    with pytest.raises(RuntimeError) as caught, ending_with_others():
        raise error
    assert caught.value is error


def ended(*codes: int) -> list[Member]:
    """Processes that ended with these exit codes."""
    processes = [SimpleNamespace(returncode=code, poll=lambda code=code: code) for code in codes]
    return [Member(rank, cast(subprocess.Popen, process), None) for rank, process in enumerate(processes)]


@pytest.mark.parametrize(
    ("codes", "blamed"),
    [
        ((LOST_OTHERS, 0, -9), "process 2 of 3 was killed by SIGKILL"),
        ((-6, -9), "process 1 of 2 was killed by SIGKILL"),
        ((-6, LOST_OTHERS), "process 0 of 2 was killed by SIGABRT"),
        ((1, -9), "process 1 of 2 was killed by SIGKILL"),
        ((LOST_OTHERS, 1), "process 1 of 2 ended with exit code 1"),
        ((LOST_OTHERS, 2), "process 1 of 2 ended with exit code 2"),
        ((1, LOST_OTHERS), "process 0 of 2 ended with exit code 1"),
    ],
)
def test_who_died_first_is_named_and_not_who_missed_it(codes: tuple[int, ...], blamed: str) -> None:
    with pytest.raises(UserError, match=blamed):
        _wait(ended(*codes))


@pytest.mark.parametrize("codes", [(2, LOST_OTHERS), (INTERRUPTED, INTERRUPTED), (LOST_OTHERS, INTERRUPTED)])
def test_what_was_said_already_is_not_said_again(codes: tuple[int, int]) -> None:
    with pytest.raises(SystemExit) as end:
        _wait(ended(*codes))
    assert end.value.code in (2, INTERRUPTED)


def test_all_that_finish_are_fine() -> None:
    _wait(ended(0, 0))


def test_who_dies_while_the_first_runs_on_is_noticed() -> None:
    class Process:
        """Knows how it ended once it is asked, as `Popen` does."""

        returncode: int | None = None

        def __init__(self, code: int | None) -> None:
            self.code, self.asked = code, 0

        def poll(self) -> int | None:
            self.asked += 1
            assert self.asked < 10, "the others were not asked"
            self.returncode = self.code
            return self.code

    members = [Member(rank, cast(subprocess.Popen, Process(code)), None) for rank, code in enumerate((None, 1))]
    with pytest.raises(UserError, match="process 1 of 2 ended with exit code 1"):
        _wait(members)
