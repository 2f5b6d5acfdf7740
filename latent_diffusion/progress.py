"""Progress of long work: a bar on a terminal, plain lines elsewhere, both with rate and remaining time."""

import sys
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

# Seconds between the lines of a log file.
LINE_INTERVAL = 10.0


# What a line of training shows of the logged values, in this order.
_SHOWN = ("loss", "mse", "vb", "grad_norm", "learning_rate")
_SHOWN += ("samples_per_second", "steps_per_second", "peak_memory_gib")


def training_line(step: int, steps: int, logs: dict[str, float]) -> str:
    """One line of the log of training: the step, what was logged and, where a rate was, the remaining time."""
    values = ", ".join(f"{name} {logs[name]:.4g}" for name in _SHOWN if name in logs)
    line = f"step {step}/{steps}: {values}"
    if rate := logs.get("steps_per_second"):
        line += f", remaining {tqdm.format_interval((steps - step) / rate)}"
    return line


class LossyStream:
    """Passes text on to a stream; what cannot be written is lost, which is said once on stderr.

    Args:
        stream: takes the text.
        name: of the stream.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name, self._has_warned = stream, name, False

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def close(self) -> None:
        self._attempt(self._stream.close)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                print(f"warning: lines of {self._name} are being lost: {error.strerror}", file=sys.stderr, flush=True)


def outlive_lost_lines() -> None:
    """From now on the process goes on where its standard streams cannot be written: a log is not worth a long run."""
    sys.stdout = LossyStream(sys.stdout, "the standard output")
    sys.stderr = LossyStream(sys.stderr, "the standard error")


def write_line(text: str) -> None:
    """Prints a line, above the bar where there is one."""
    tqdm.write(text)
    sys.stdout.flush()


def progress(total: int, desc: str, unit: str) -> tqdm:
    """A tqdm bar on stderr; where stderr is no terminal it writes lines, at most one every `LINE_INTERVAL` seconds."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit)
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        file=_Lines(),
        mininterval=LINE_INTERVAL,
        bar_format="{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}",
    )


class _Lines:
    """Takes what tqdm draws over itself and writes it line by line."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()
