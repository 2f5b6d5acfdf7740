"""Damaged data of every layout: what is read is right, or one sentence says which file is not.

Of every case a tiny valid folder is made, changed, opened as a command opens it, and read to the end, in a process of
its own. Either every value is that of the intact folder, except for those of the changed files where no checksum
protects them, or there is one `InputError`, in one line, that names a path in the folder.
"""

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from latent_diffusion.errors import InputError

from .data_layouts import LAYOUTS, Layout, SmallShards, Values
from .data_mutations import HARMLESS, MARKER, UNPRIVILEGED, kinds_of
from .memory import memory

SEED = 0
# All cases at scale 1; never less than each mutation once on each layout.
CASES = 6000
# Seconds after which a case hangs, and how many cases a process reads.
TIMEOUT, CASES_OF_A_PROCESS = 5.0, 50
# Bytes that a process may allocate beyond what it had at its start.
MEMORY = 1 << 29
NOBODY = 65534
_PROGRESS = re.compile(r"[\w ]+: \d+/\d+[^\n]*\n?|\r")


@dataclass(frozen=True)
class Case:
    """Changes to make in a folder of a layout.

    Attributes:
        number: of the case; its random choices are a function of it and the seed.
        layout: index in `LAYOUTS`.
        changes: names of mutations with the file that each changes.
        late: they are made when the folder has been opened.
    """

    number: int
    layout: int
    changes: tuple[tuple[str, str], ...]
    late: bool

    def __str__(self) -> str:
        what = " and ".join(f"{change}: {path}" for change, path in self.changes)
        return f"case {self.number}, {LAYOUTS[self.layout].name}, {what}{', after opening' if self.late else ''}"


def run(folder: Path, scale: float, seed: int = SEED) -> dict[str, int | float | str]:
    """Reads mutated folders.

    Args:
        folder: for the folders; empty.
        scale: 1 for `CASES` cases.
        seed: of the random choices.

    Returns:
        How many cases there were, and how they ended.

    Raises:
        AssertionError: some ended otherwise; each is named.
    """
    print(f"data: seed {seed}", flush=True)
    folder.chmod(0o755)  # for those without rights
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else _in_folder(folder):
        intact = make_templates()
        cases = list(make_cases(int(scale * CASES), seed))
        ends, failures = Counter(), []
        for start in range(0, len(cases), CASES_OF_A_PROCESS):
            for case, end, message in read_cases(cases[start : start + CASES_OF_A_PROCESS], intact, seed):
                ends[end] += 1
                if end == "failed":
                    failures.append(f"{case}: {message}")
                    print(failures[-1], flush=True)
            print(f"data: {min(start + CASES_OF_A_PROCESS, len(cases))}/{len(cases)}", dict(ends), flush=True)
    assert not failures, f"{len(failures)} of {len(cases)} cases failed:\n" + "\n".join(failures)
    changes = {change for case in cases for change, _ in case.changes}
    return {"layouts": len(LAYOUTS), "kinds": len(changes), "cases": len(cases)} | ends


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make_templates() -> list[Values]:
    """Makes the intact folder of each layout and gives what is read of it."""
    intact = []
    for number, layout in enumerate(LAYOUTS):
        template = _template(number)
        template.mkdir()
        with SmallShards():
            layout.build(template)
            shutil.copytree(template, "intact")
            intact.append(layout.values(layout.open(Path("intact"))))
        shutil.rmtree("intact")
        Path("intact.npz").unlink(missing_ok=True)
        assert intact[-1], f"nothing is read of {layout.name}"
    return intact


def _template(layout: int) -> Path:
    return Path(f"template-{layout}")


def make_cases(count: int, seed: int) -> Iterator[Case]:
    """Every mutation on every kind of file of every layout, as far as `count` allows, then random ones.

    The first cases have each mutation once on each layout, whatever the count.
    """
    rng = np.random.default_rng([seed, 1])
    groups = [_groups(number) for number in range(len(LAYOUTS))]
    first, second = [], []
    for number, files_of_kinds in enumerate(groups):
        once = set()
        for files in (files_of_kinds[k] for k in rng.permutation(len(files_of_kinds))):
            for kind in kinds_of(files[0]):
                entry = (number, ((kind, files[rng.integers(len(files))]),), bool(rng.random() < 0.25))
                (second if kind in once else first).append(entry)
                once.add(kind)
    table = first + [second[k] for k in rng.permutation(len(second))][: max(0, count - len(first))]
    while len(table) < count:
        number = int(rng.integers(len(LAYOUTS)))
        files = [file for files in groups[number] for file in files]
        changes = []
        for path in rng.choice(files, size=min(len(files), int(rng.integers(1, 4))), replace=False).tolist():
            kinds = list(kinds_of(path))
            changes.append((kinds[rng.integers(len(kinds))], path))
        table.append((number, tuple(changes), bool(rng.random() < 0.25)))
    for number, entry in enumerate(table):
        yield Case(number, *entry)


def _groups(layout: int) -> list[list[str]]:
    """The files of a layout, those of one folder and suffix together."""
    template, groups = _template(layout), {}
    for path in sorted(template.rglob("*")):
        if path.is_file():
            kind = "caption" if "_" in path.stem and path.suffix == ".npy" else path.suffix
            groups.setdefault((path.parent, kind), []).append(str(path.relative_to(template)))
    return list(groups.values())


def read_cases(cases: list[Case], intact: list[Values], seed: int) -> Iterator[tuple[Case, str, str]]:
    """How each case ended ("same", "values", "refused" or "failed") and why; each in a process that does many."""
    while cases:
        done = 0
        for end, message in _in_process(cases, intact, seed):
            yield cases[done], end, message
            done += 1
        if done < len(cases):
            yield cases[done], "failed", "the process ended or hung"
            done += 1
        cases = cases[done:]


def _in_process(cases: list[Case], intact: list[Values], seed: int) -> Iterator[tuple[str, str]]:
    """The ends of cases up to the first that ends the process, or hangs."""
    answers, own = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        os.close(answers)
        _read_all(cases, intact, seed, own)
    os.close(own)
    with os.fdopen(answers, "rb") as file:
        for _ in cases:
            line = _line_in_time(file)
            if not line:
                break
            yield tuple(json.loads(line))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _line_in_time(file: BinaryIO) -> bytes:
    ready, _, _ = select.select([file], [], [], TIMEOUT)
    return file.readline() if ready else b""


def _read_all(cases: list[Case], intact: list[Values], seed: int, answers: int) -> None:
    """What the process does that reads cases."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + MEMORY, resource.RLIM_INFINITY))
        with SmallShards(), Path("printed").open("w+b") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            # As they are without the test runner, which catches both.
            sys.stdout, sys.stderr, warnings.showwarning = sys.__stdout__, sys.__stderr__, _show_warning
            for case in cases:
                answer = read_case(case, intact[case.layout], seed, printed)
                os.write(answers, json.dumps(answer).encode() + b"\n")
    finally:
        os._exit(0)


def _show_warning(message: Warning, category: type, filename: str, line: int, *_: object) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, line))


def read_case(case: Case, intact: Values, seed: int, printed: BinaryIO) -> tuple[str, str]:
    """How a case ended, and why."""
    folder, layout = Path(f"case-{case.number}"), LAYOUTS[case.layout]
    shutil.copytree(_template(case.layout), folder)
    printed.truncate(0)
    touched: set[str] = set()
    try:
        end, message = _read_mutated(case, folder, touched, seed)
        if isinstance(message, dict):
            end, message = _compared(message, intact, layout, case, touched)
        elif end == "refused":
            end, message = _checked_message(message, folder)
        if (folder / MARKER).exists() or Path(MARKER).exists():
            end, message = "failed", "a payload was executed"
        sys.stdout.flush()
        sys.stderr.flush()
        printed.seek(0)
        if end != "failed" and (text := _PROGRESS.sub("", printed.read().decode(errors="replace")).strip(" \0\r\n")):
            end, message = "failed", f"printed {text[:500]!r}"
    finally:
        for path in (folder, folder.with_name(f"{folder.name}.elsewhere")):
            _remove(path)
    return end, message


def _read_mutated(case: Case, folder: Path, touched: set[str], seed: int) -> tuple[str, Values | str]:
    layout = LAYOUTS[case.layout]
    rng = np.random.default_rng([seed, 2, case.number])

    def mutate() -> None:
        for change, path in case.changes:
            if not (folder / path).is_file():
                continue  # another change has removed it
            try:
                touched.update([path, *kinds_of(path)[change](folder, path, rng)])
            except (OSError, ValueError):  # another change is in its way
                assert len(case.changes) > 1
                touched.update([path, str(Path(path).parent)])

    unprivileged = any(change in UNPRIVILEGED for change, _ in case.changes)
    try:
        opened = layout.open(folder) if case.late else None
        mutate()
        warnings.resetwarnings()
        with _without_rights(folder) if unprivileged else contextlib.nullcontext():
            return "read", layout.values(opened if case.late else layout.open(folder))
    except InputError as error:
        return "refused", str(error)
    except BaseException:
        return "failed", traceback.format_exc()[-1500:]


@contextlib.contextmanager
def _without_rights(folder: Path) -> Iterator[None]:
    """Lets the superuser, whom no permission stops, be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            os.chown(path, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def _compared(values: Values, intact: Values, layout: Layout, case: Case, touched: set[str]) -> tuple[str, str]:
    harmless = all(change in HARMLESS for change, _ in case.changes)

    def may_differ(path: str) -> bool:
        return not harmless and any(not layout.checked(other) and _is_of(path, other) for other in touched)

    strange = [key for key in values.keys() | intact.keys() if values.get(key) != intact.get(key)]
    if wrong := [key for key in strange if not may_differ(key[0])]:
        return "failed", f"other values than the intact folder's, or none: {wrong[:3]}"
    return ("values", "") if strange else ("same", "")


def _is_of(path: str, other: str) -> bool:
    return path in ("", other) or path.startswith(f"{other}/") or other.startswith(f"{path}/") or other == "."


def _checked_message(message: str, folder: Path) -> tuple[str, str]:
    if not message.isprintable() or str(folder) not in message or len(message) > 2000:
        return "failed", f"the message is not one line that names a path: {message[:500]!r}"
    return "refused", message


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for parent, _, _ in os.walk(path):
            Path(parent).chmod(0o755)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
