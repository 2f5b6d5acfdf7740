"""Ending a run early on request: a signal, or its time is over."""

import contextlib
import ctypes
import os
import signal
import time

# Signals of so many seconds are one request: Paddle's launchers send SIGTERM several times within one.
ONE_REQUEST = 2.0

# From Linux's prctl.h.
PR_SET_PDEATHSIG = 1


def follow_launcher() -> None:
    """Lets the system send SIGTERM to a process of a launched run when its launcher dies, which would orphan it."""
    if "PADDLE_TRAINER_ID" in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StopRequest:
    """Within its context SIGTERM and SIGINT ask for an end after the step at hand, as `hours` do when they are over.

    A signal that comes more than `ONE_REQUEST` seconds after the first ends the process at once.

    Args:
        hours: from now; None for no limit.

    Raises:
        ValueError: it is used in another thread than the main one, which alone gets signals.
    """

    def __init__(self, hours: float | None = None):
        self._hours = hours
        self._deadline = None if hours is None else time.monotonic() + hours * 3600
        self._signal: signal.Signals | None = None
        self._since = 0.0

    @property
    def reason(self) -> str | None:
        """What has asked for the end, or None."""
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"--max_run_hours {self._hours:g}"
        return None

    def __enter__(self) -> "StopRequest":
        self._former = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self._former:
            # Paddle takes a system call that a signal has interrupted for a lost connection.
            signal.siginterrupt(number, False)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            # After a request the process is about to end: what belongs to that request must not end it another way.
            signal.signal(number, handler if self._signal is None else signal.SIG_IGN)

    def _take(self, number: int, frame: object) -> None:
        if self._signal is None:
            self._signal, self._since = signal.Signals(number), time.monotonic()
            _say(f"{self._signal.name}: stopping after this step and saving; once more stops at once")
        elif time.monotonic() - self._since > ONE_REQUEST:
            _say(f"{signal.Signals(number).name} once more: stopped at once; the last complete checkpoint is as it was")
            os._exit(128 + number)


def _say(text: str) -> None:
    # A signal may come while a stream is being written, which must not be entered again.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
