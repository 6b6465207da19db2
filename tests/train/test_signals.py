import signal

import pytest

from shoal.train import signals
from shoal.train.signals import StopRequest


def test_what_reaches_a_process_twice_at_once_is_one_request() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGTERM)  # from a process manager
        signal.raise_signal(signal.SIGTERM)  # from the launcher, which it told as well
        assert stop.asked
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_later_request_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ONE_REQUEST_SECONDS", 0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have us ignore it
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.asked
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
