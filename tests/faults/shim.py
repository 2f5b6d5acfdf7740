"""A library for LD_PRELOAD that counts, logs and breaks what a process does to files; for Linux with a C compiler."""

import errno
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")

# What a disk or a mount fails with: full, over the quota, too large a file, read-only, broken, gone.
ERRORS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE")


def is_available() -> bool:
    """Whether it can be built here."""
    return shutil.which("cc") is not None


def build(folder: Path) -> Path:
    """Compiles the library into `folder` and returns its path."""
    library = folder / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-o", library, SOURCE, "-ldl"], check=True)
    return library


@dataclass
class Fault:
    """What happens to calls on the files that match `paths`, a pattern in which * takes slashes too.

    Attributes:
        paths: pattern of absolute paths.
        log: file to which every call is appended.
        kill_at: number of the call, from 1, in place of which the process is killed.
        error: name of the errno that calls fail with.
        at: number of the first call that fails.
        calls: how many fail; None for all from then on.
        only_while: they fail only while this file exists.
        short: a write that is to fail first writes half of its bytes.
        delay: milliseconds that each call takes longer.
        rank: only in this process of a launched run.
    """

    paths: str
    log: Path | None = None
    kill_at: int | None = None
    error: str | None = None
    at: int | None = None
    calls: int | None = None
    only_while: Path | None = None
    short: bool = False
    delay: int | None = None
    rank: int | None = None

    def variables(self) -> dict[str, str]:
        """The environment variables that say so."""
        values = {
            "FAULT_PATHS": self.paths,
            "FAULT_LOG": self.log,
            "FAULT_KILL_AT": self.kill_at,
            "FAULT_ERRNO": self.error and getattr(errno, self.error),
            "FAULT_AT": self.at,
            "FAULT_CALLS": self.calls,
            "FAULT_WHILE": self.only_while,
            "FAULT_SHORT": 1 if self.short else None,
            "FAULT_DELAY": self.delay,
            "FAULT_RANK": self.rank,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Call:
    """A call that was logged: its name, its path, the second path of a rename or "", and what it returned."""

    name: str
    path: str
    other: str
    result: int


def read_log(path: Path) -> list[Call]:
    """The calls of a log in their order."""
    lines = (line.split("\t") for line in path.read_text().splitlines())
    return [Call(name, first, second, int(result)) for name, first, second, result in lines]
