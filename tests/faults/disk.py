"""Failing disks while training saves: it goes on, earlier checkpoints stay, and the end is that of a quiet run."""

import errno
import os
import random
import shutil
from collections import Counter
from pathlib import Path

from latent_diffusion import checkpoint
from tests.cli.commands import Result

from . import full_disk, shim
from .kills import SAVE_STEPS, SAVING, STEPS, Kind, Quiet, compare, final_checkpoint, make_kinds, run_quietly, step_of
from .runs import Server

KINDS = ("trainer 1", "loop 1", "trainer 2", "loop 2", "uvit 1")

# Points at which each error comes, for each kind.
POINTS = 8

# Less than the weights of the tiny models take, more than a log.
FILE_LIMIT = 60_000


def fail_once(server: Server, kind: Kind, quiet: Quiet, folder: Path, error: str, rng: random.Random) -> bool:
    """One call inside saving fails; the run must end as a quiet one. Returns whether a checkpoint was left out."""
    rank = rng.randrange(kind.processes) if kind.processes > 1 else None
    # The first half: before the last save, whose failure ends the run.
    fault = shim.Fault(SAVING, error=error, at=rng.randint(1, quiet.calls[SAVING] // 2), calls=1, short=True, rank=rank)
    result = _train(server, kind, folder, fault)
    where = f"{kind.name}, {fault}: {result.out}"
    assert result.code == 0, where
    compare(quiet.final, final_checkpoint(kind, folder))
    _check_all_whole(kind, folder)
    return _has_warned(result, error, where)


def fail_for_a_while(server: Server, kind: Kind, quiet: Quiet, folder: Path, error: str) -> None:
    """All of the second save fails; the checkpoint before it stays, the one after it is written."""
    fault = shim.Fault(f"*/.checkpoint-{2 * SAVE_STEPS}.*", error=error)
    result = _train(server, kind, folder, fault)
    assert result.code == 0 and _has_warned(result, error, result.out), result.out
    compare(quiet.final, final_checkpoint(kind, folder))
    _check_all_whole(kind, folder)


def fail_at_last(server: Server, kind: Kind, quiet: Quiet, folder: Path, error: str) -> None:
    """The last save fails: so does the run, in one sentence; the same command then goes on to the same end."""
    result = _train(server, kind, folder, shim.Fault(f"*/.checkpoint-{STEPS}.*", error=error))
    lines = [line for line in result.out.splitlines() if line.startswith("error: ")]
    assert result.code == 1 and len(lines) == kind.processes and "Traceback" not in result.out, result.out
    assert all(f"checkpoint-{STEPS}" in line and _says(line, error) for line in lines), lines
    assert step_of(kind.newest(folder)) == STEPS - SAVE_STEPS
    _check_all_whole(kind, folder)
    assert _train(server, kind, folder).code == 0
    compare(quiet.final, final_checkpoint(kind, folder))


def limit_files(server: Server, kind: Kind, quiet: Quiet, folder: Path) -> None:
    """No file may be as large as the weights: every save fails, the last one ends the run."""
    folder.mkdir(parents=True)
    running = server.start(kind.command(folder), folder / "output", kind.processes, file_limit=FILE_LIMIT)
    result = running.result()
    assert result.code == 1 and "Traceback" not in result.out, result.out
    warnings = result.out.count("warning: cannot save")
    assert warnings >= STEPS // SAVE_STEPS - 1 and "File too large" in result.out and kind.newest(folder) is None, (
        result.out
    )
    assert _train(server, kind, folder).code == 0
    compare(quiet.final, final_checkpoint(kind, folder))


def _train(server: Server, kind: Kind, folder: Path, fault: shim.Fault | None = None) -> Result:
    folder.mkdir(parents=True, exist_ok=True)
    command = kind.command(folder, variables=fault.variables() if fault else {})
    return server.start(command, folder / "output", kind.processes).result()


def _has_warned(result: Result, error: str, where: str) -> bool:
    warnings = [line for line in result.out.splitlines() if line.startswith("warning: cannot save ")]
    assert len(warnings) <= 1 and all(_says(line, error) for line in warnings), where
    assert "Traceback" not in result.out, where
    return bool(warnings)


def _says(line: str, error: str) -> bool:
    """Whether a message names the error and how much space is needed."""
    return os.strerror(getattr(errno, error)) in line and " MB" in line


def _check_all_whole(kind: Kind, folder: Path) -> None:
    for output in kind.outputs(folder):
        for path in checkpoint.checkpoints(output):
            checkpoint.verify(path)


def run(folder: Path, scale: float, seed: int = 0) -> dict[str, int | float | str]:
    """Each error at several points of the saves of each kind, and full disks; see the package."""
    server, kinds, rng, counts = Server(), make_kinds(folder), random.Random(seed), Counter()
    quiet = {name: run_quietly(server, kinds[name], folder / "quiet" / name) for name in KINDS}
    for name in KINDS:
        for error in shim.ERRORS:
            for number in range(max(1, round(POINTS * scale))):
                one = folder / "once" / f"{name} {error} {number}"
                counts["saves left out"] += fail_once(server, kinds[name], quiet[name], one, error, rng)
                counts["faults"] += 1
            fail_for_a_while(server, kinds[name], quiet[name], folder / "while" / f"{name} {error}", error)
            fail_at_last(server, kinds[name], quiet[name], folder / "last" / f"{name} {error}", error)
            counts["faults"] += 2
            shutil.rmtree(folder / "once")
        limit_files(server, kinds[name], quiet[name], folder / "limit" / name)
        counts["faults"] += 1
        print(f"{name}: {dict(counts)}", flush=True)
    counts["full disks"] = full_disk.run_all(server, kinds, folder / "full")
    return dict(counts)
