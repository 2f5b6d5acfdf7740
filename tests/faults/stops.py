"""Ends training before its time by a signal or by the clock: it saves, says so, ends well, and can be resumed."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from latent_diffusion.stopping import ONE_REQUEST
from tests.cli.commands import Result

from . import shim
from .kills import (
    SAVE_STEPS,
    SAVING,
    STEPS,
    Kind,
    Quiet,
    compare,
    final_checkpoint,
    has_begun,
    launch,
    make_kinds,
    run_quietly,
    step_of,
    wait_for,
)
from .runs import Running, Server, children, exists

# Milliseconds that each call inside saving takes longer, so that a signal comes before the run has ended.
DELAY = 20

# The same where a second signal is to come later than belongs to the first, and saving still goes on.
LONG_DELAY = 130

# The step at whose save the signal comes.
SIGNALED = 2 * SAVE_STEPS


def _start(server: Server, kind: Kind, folder: Path, delay: int) -> Running:
    """Starts a run, and waits until it saves the checkpoint of `SIGNALED`."""
    command = kind.command(folder, variables=shim.Fault(SAVING, delay=delay).variables())
    running = server.start(command, folder / "output", kind.processes)
    wait_for(lambda: has_begun(kind, folder, SIGNALED) or not running.is_running())
    return running


def _check_stop(kind: Kind, folder: Path, result: Result, reason: str, first: int, last: int) -> None:
    assert result.code == 0, result.out
    step = step_of(kind.newest(folder))
    assert first <= step <= last, f"{kind.name}: stopped at step {step}, not from {first} to {last}: {result.out}"
    assert f"stopped by {reason} after step {step} of {STEPS}" in result.out, result.out


def by_signal(number: signal.Signals, *which: int) -> Callable[[Server, Kind, Path], None]:
    """A case: these processes, or all, get a signal."""

    def case(server: Server, kind: Kind, folder: Path) -> None:
        running = _start(server, kind, folder, DELAY)
        running.signal(number, *which)
        reason = "another process" if which and 0 not in which else number.name
        _check_stop(kind, folder, running.result(), reason, SIGNALED, SIGNALED + 1)

    return case


def by_second_signal(server: Server, kind: Kind, folder: Path) -> None:
    """A case: a second signal comes while the first one's checkpoint is being saved."""
    running = _start(server, kind, folder, LONG_DELAY)
    running.signal(signal.SIGTERM)
    time.sleep(ONE_REQUEST + 0.2)
    assert running.is_running(), running.output.read_text()
    running.signal(signal.SIGTERM)
    began = time.monotonic()
    result = running.result()
    assert result.code == 128 + signal.SIGTERM and "stopped at once" in result.out, result.out
    assert time.monotonic() - began < 1.0 + 2e-3 * LONG_DELAY, "a second signal is not obeyed at once"
    assert step_of(kind.newest(folder)) == SIGNALED - SAVE_STEPS


def by_clock(server: Server, kind: Kind, folder: Path) -> None:
    """A case: the time that the run was given is over."""
    hours = 1e-7
    result = server.start(kind.command(folder, "--max_run_hours", hours), folder / "output", kind.processes).result()
    _check_stop(kind, folder, result, f"--max_run_hours {hours:g}", 1, 1)


def by_launcher(server: Server, kind: Kind, folder: Path) -> None:
    """A case: Paddle's launcher gets SIGTERM, of which it dies; its processes see that, and have logs of their own."""
    running = launch(kind, folder)
    wait_for(lambda: has_begun(kind, folder, SAVE_STEPS) or not running.is_running())
    workers = children(running.pids[0])
    running.signal(signal.SIGTERM)
    wait_for(lambda: not any(map(exists, workers)), f"{workers} stay when the launcher gets SIGTERM")
    running.result()
    log = (folder / "log/workerlog.0").read_text()
    _check_stop(kind, folder, Result(0, log, ""), "SIGTERM", SAVE_STEPS, STEPS - 1)


CASES: dict[str, tuple[str, Callable[[Server, Kind, Path], None]]] = {
    "SIGTERM to the trainer": ("trainer 1", by_signal(signal.SIGTERM)),
    "SIGTERM to the loop": ("loop 1", by_signal(signal.SIGTERM)),
    "SIGINT to the U-ViT trainer": ("uvit 1", by_signal(signal.SIGINT)),
    "SIGTERM to two processes": ("trainer 2", by_signal(signal.SIGTERM)),
    "SIGTERM to one process of two": ("loop 2", by_signal(signal.SIGTERM, 1)),
    "SIGINT to the loop": ("loop 1", by_signal(signal.SIGINT)),
    "SIGTERM to the SDXL trainer": ("sdxl 1", by_signal(signal.SIGTERM)),
    "second signal to the trainer": ("trainer 1", by_second_signal),
    "second signal to the loop": ("loop 1", by_second_signal),
    "second signal to two processes": ("loop 2", by_second_signal),
    "clock of the trainer": ("trainer 1", by_clock),
    "clock of the loop": ("loop 2", by_clock),
    "launcher of the trainer": ("trainer 2", by_launcher),
    "launcher of the loop": ("loop 2", by_launcher),
}


def check(server: Server, name: str, kind: Kind, quiet: Quiet, folder: Path) -> None:
    """Runs a case in an empty folder; then the run goes on, and must end as a quiet one.

    Raises:
        AssertionError: it did not end as it should, or what it left cannot be resumed to the same end.
    """
    folder.mkdir(parents=True)
    CASES[name][1](server, kind, folder)
    result = server.start(kind.command(folder), folder / "output", kind.processes).result()
    assert result.code == 0 and "resuming from" in result.out, f"{name}: {result.out}"
    compare(quiet.final, final_checkpoint(kind, folder))


def run(folder: Path, scale: float) -> dict[str, int | float | str]:
    """All cases, so many times; see the package."""
    server, kinds = Server(), make_kinds(folder)
    used = sorted({kind for kind, _ in CASES.values()})
    quiet = {name: run_quietly(server, kinds[name], folder / "quiet" / name) for name in used}
    rounds = max(1, round(3 * scale))
    for number in range(rounds):
        for name, (kind, _) in CASES.items():
            check(server, name, kinds[kind], quiet[kind], folder / f"{number}" / name)
            print(f"{name}: resumed, and the same in the end", flush=True)
        shutil.rmtree(folder / f"{number}")
    return {"stops": rounds * len(CASES), "resumes": rounds * len(CASES), "matches": rounds * len(CASES)}
