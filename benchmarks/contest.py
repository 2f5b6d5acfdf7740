"""Programs measured against each other: each in a process of its own, in turn, so that all meet the same load.

A contestant may live in another environment, and its peak memory is its own. It prints one JSON object as its last
line: "seconds", a list; "peak_memory" in bytes where it is measured; and figures of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from latent_diffusion.errors import InputError

from .report import ROOT

# The programs, and the environment that `make peers` makes.
PEERS = ROOT / "benchmarks" / "peers"
PEERS_ENVIRONMENT = ROOT / ".venv-peers" / "bin" / "python"

# Seconds after which a contestant hangs.
LIMIT = 3600

# As it was before `runtime.start()` adds to it: each contestant decides for itself.
_ENVIRONMENT = dict(os.environ)


@dataclass(frozen=True)
class Contestant:
    """A program to measure: its command line, and variables that join those of the environment."""

    name: str
    command: Sequence[object]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What the runs of a contestant printed, or why the last one failed."""

    name: str
    runs: list[dict] = field(default_factory=list)
    failure: str | None = None

    @property
    def seconds(self) -> list[float]:
        """Of all rounds."""
        return [value for run in self.runs for value in run["seconds"]]

    @property
    def median(self) -> float:
        """Median of the seconds of all rounds; `min` and `max` likewise."""
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def max(self) -> float:
        return max(self.seconds)

    @property
    def peak_memory(self) -> int | None:
        """The largest of all rounds in bytes; None if it was not measured."""
        return max((run["peak_memory"] for run in self.runs if "peak_memory" in run), default=None)

    def figure(self, name: str) -> float | None:
        """The median over the rounds of another number that was printed, or of the numbers of a list; None without."""
        values = [value for run in self.runs for value in _as_list(run.get(name))]
        return statistics.median(values) if values else None


def compete(
    contestants: Iterable[Contestant], rounds: int, on_round: Callable[[int, Result], None] | None = None
) -> dict[str, Result]:
    """Runs every contestant once per round, in an order that is rotated by one each round.

    One that fails is not run again, and the others go on.

    Args:
        contestants: with different names.
        rounds: at least 1.
        on_round: called after each run with the round, from 0 on, and the contestant's result so far.

    Returns:
        Results by name, in the order of the contestants.
    """
    contestants = list(contestants)
    results = {contestant.name: Result(contestant.name) for contestant in contestants}
    for number in range(rounds):
        for contestant in rotated(contestants, number):
            result = results[contestant.name]
            if result.failure:
                continue
            try:
                result.runs.append(run(contestant))
            except InputError as error:
                result.failure = str(error)
            if on_round:
                on_round(number, result)
    return results


class Progress:
    """For `on_round`: a line on stderr after each of `runs` runs, with what is left at the present speed."""

    def __init__(self, runs: int):
        self.runs, self.done, self.start = runs, 0, time.monotonic()

    def __call__(self, number: int, result: Result) -> None:
        self.done += 1
        left = (time.monotonic() - self.start) / self.done * (self.runs - self.done)
        outcome = f"failed: {result.failure}" if result.failure else f"{result.median:.3g} s"
        line = f"[{self.done}/{self.runs}, about {left / 60:.0f} min left] round {number + 1}, {result.name}: {outcome}"
        print(line, file=sys.stderr, flush=True)


def rotated(contestants: Sequence[Contestant], number: int) -> list[Contestant]:
    """The order of round `number`."""
    start = number % len(contestants) if contestants else 0
    return [*contestants[start:], *contestants[:start]]


def run(contestant: Contestant) -> dict:
    """What a contestant prints, run in an empty folder of its own.

    Raises:
        InputError: it cannot be run or fails, with its last line on stderr, or prints no JSON object.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        try:
            done = subprocess.run(
                [str(word) for word in contestant.command],
                cwd=folder,
                env=_ENVIRONMENT | dict(contestant.environment),
                capture_output=True,
                text=True,
                timeout=LIMIT,
            )
        except OSError as error:
            raise InputError(f"{contestant.command[0]} cannot be run: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise InputError(f"no end after {LIMIT // 60} minutes") from None
    if done.returncode:
        # Paddle's launcher shows on stdout what its processes print on stderr.
        reason = done.stdout if "LAUNCH ERROR" in done.stderr else done.stderr
        raise InputError((reason.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    try:
        return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    except (IndexError, json.JSONDecodeError):
        raise InputError("printed no JSON object") from None


def peer_python() -> Path | None:
    """The interpreter with PyTorch: what PEER_PYTHON names, or that of .venv-peers; None, with a note, without one."""
    path = Path(os.environ.get("PEER_PYTHON") or PEERS_ENVIRONMENT)
    if path.is_file():
        return path.absolute()
    print(f"note: there is no {path}, so PyTorch is left out; `make peers` makes it", file=sys.stderr, flush=True)
    return None


def raise_failures(results: Iterable[Result]) -> None:
    """To be called at the end.

    Raises:
        InputError: some of the contestants failed.
    """
    failed = [result.name for result in results if result.failure]
    if failed:
        raise InputError(f"{len(failed)} failed: {', '.join(failed)}; their rows say why")


def _as_list(value: object) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
