"""Hostile files: each attack of `attacks.py` is read by what reads such files in this project, in a forked process.

An attack fails when its file is refused with one sentence that names it, or, where nothing reads it, is passed over;
while no code ran, nothing outside was written or read, and time and memory stayed bounded.
"""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from latent_diffusion.errors import InputError

from .memory import forget_peak, memory

# Of one attack: seconds, and bytes of memory beyond those of the process that it begins in.
TIME_LIMIT = 5.0
MEMORY_LIMIT = 200e6

# Of the process, so that an attack that succeeds does not take the machine with it.
_ADDRESS_SPACE = 4 << 30

# More letters than one sentence has.
_LONGEST_MESSAGE = 700

# Events of Python's audit hooks (PEP 578) that no reader has a reason for. `pickle.find_class` is raised by Python's
# own unpicklers alone.
_FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill"),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate"),
    *("subprocess.", "pty.", "socket.", "shutil.", "tempfile.", "urllib.", "ctypes.dlopen", "pickle.find_class"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Where reading is not part of an attack: what is installed, and what the system says of the machine.
_INSTALLED = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/", "/lib", "/etc/mime.types", "/etc/localtime")

_SECRET = "secret.txt"


@dataclass(frozen=True)
class Attack:
    """A hostile file and who reads it.

    Attributes:
        kind: of the file; figures are counted by it.
        name: says what it tries.
        read: the reader; it is given the path of the file.
        file: name of the file, or a path below the folder.
        content: its bytes; or what makes the files, given the path.
        named: what the refusal must name; None for `file`.
        is_read: False for what no reader should open: then reading succeeds.
    """

    kind: str
    name: str
    read: Callable[[Path], object]
    file: str
    content: bytes | Callable[[Path], object]
    named: str | None = None
    is_read: bool = True

    def write(self, folder: Path) -> Path:
        """Makes the files in a folder and returns the path that is read."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content)
        return path


@dataclass(frozen=True)
class Outcome:
    """What an attack did.

    Attributes:
        end: "refused", "read", "raised" (anything but a refusal) or "killed".
        message: of the refusal; the traceback of what was raised.
        events: what was tried that no reader has a reason for.
        seconds: that it took.
        memory: bytes that it took beyond those of the process that it began in.
    """

    end: str
    message: str
    events: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0


def run(folder: Path, scale: float) -> dict[str, int | float | str]:
    """Executes all attacks; `scale` changes nothing, since there are no more of them.

    Returns:
        How many attacks of each kind failed, as all did; the longest time and the most memory of one.

    Raises:
        AssertionError: attacks succeeded; it names each, with what happened.
    """
    reports = _in_fresh_process(folder / "attacks")
    problems = [f"{report['attack']}: {problem}" for report in reports for problem in report["problems"]]
    assert not problems, "\n".join([f"{len(problems)} problems with {len(reports)} attacks:", *problems])
    print(f"hostile files: {len(reports)} attacks, none succeeded", flush=True)
    return {
        "attacks": len(reports),
        **Counter(report["kind"] for report in reports),
        "longest (s)": round(max(report["seconds"] for report in reports), 2),
        "most memory (MB)": round(max(report["memory"] for report in reports) / 1e6),
    }


def problems_of(attack: Attack, outcome: Outcome) -> list[str]:
    """What is wrong with the outcome of an attack; nothing if the attack failed as it should."""
    expected = "refused" if attack.is_read else "read"
    found = [f"it did this: {event}" for event in outcome.events]
    if outcome.end != expected:
        found.append(f"it was {outcome.end}, not {expected}: {outcome.message}")
    if outcome.seconds > TIME_LIMIT:
        found.append(f"it took {outcome.seconds:.1f} s")
    if outcome.memory > MEMORY_LIMIT:
        found.append(f"it took {outcome.memory / 1e6:.0f} MB")
    if outcome.end == "refused":
        if (attack.named or attack.file) not in outcome.message:
            found.append(f"the refusal does not name {attack.named or attack.file}: {outcome.message}")
        if not outcome.message.isprintable() or len(outcome.message) > _LONGEST_MESSAGE:
            found.append(f"the refusal is not one sentence: {outcome.message!r:.2000}")
    return found


def attempts(attacks: Sequence[Attack], folder: Path) -> Iterator[Outcome]:
    """Executes attacks one after the other, in a process forked from this one, in which no threads may run.

    One that kills the process, or does not end, is followed by a new process.

    Args:
        attacks: the attacks.
        folder: a new one; each attack has a folder in it, with a file beside it that it has no business with.
    """
    folder.mkdir()
    done = 0
    while done < len(attacks):
        for outcome in _in_fork(attacks[done:], folder / str(done)):
            done += 1
            yield outcome


def _in_fork(attacks: Sequence[Attack], folder: Path) -> Iterator[Outcome]:
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receiving)
        try:
            _execute(attacks, folder, sending)
        finally:
            os._exit(1)  # whatever happens, it must not go on as its parent does
    os.close(sending)
    lines = _lines(receiving, 2 * TIME_LIMIT)
    for _ in attacks:
        start = time.monotonic()
        if (line := next(lines, None)) is None:
            os.kill(pid, signal.SIGKILL)
            yield Outcome("killed", "its process ended or was ended", seconds=time.monotonic() - start)
            break
        yield Outcome(**json.loads(line))
    os.waitpid(pid, 0)


def _execute(attacks: Sequence[Attack], folder: Path, sending: int) -> None:
    """Writes the outcome of each attack as a line of JSON, and ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + _ADDRESS_SPACE,) * 2)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    audit = _Audit()
    with os.fdopen(sending, "w") as file:
        for number, attack in enumerate(attacks):
            file.write(json.dumps(asdict(_attempt(attack, folder / str(number), audit))) + "\n")
            file.flush()
    os._exit(0)


def _attempt(attack: Attack, folder: Path, audit: "_Audit") -> Outcome:
    inside = folder / "inside"
    inside.mkdir(parents=True)
    (folder / _SECRET).write_text("not for anybody\n")
    path = attack.write(inside)
    os.chdir(inside)
    before, variables = _listing(folder), dict(os.environ)
    at_first, start = forget_peak(), time.monotonic()
    with audit.watching(inside):
        try:
            attack.read(path)
            end, message = "read", ""
        except InputError as error:
            end, message = "refused", str(error)
        except BaseException:
            end, message = "raised", traceback.format_exc(-3)
    seconds, taken = time.monotonic() - start, memory("VmHWM") - at_first
    changes = [f"changed {name}" for name, _ in sorted(before ^ _listing(folder))]
    if os.environ != variables:  # some libraries change it for a while
        changes.append("changed the environment")
    return Outcome(end, message[:4000], sorted(set(audit.events))[:10] + changes, seconds, taken)


class _Audit:
    """Notes what is done that no reader has a reason for, while it watches.

    Attributes:
        events: what was noted in the last `watching`.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self._inside: Path | None = None
        # What is installed and this project may be read; its temporary folders may lie in it.
        self._allowed = (*_INSTALLED, sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]))
        self._cache = tuple(filter(None, [os.environ.get("HF_DATASETS_CACHE")]))
        sys.addaudithook(self._note)  # it cannot be removed

    @contextlib.contextmanager
    def watching(self, inside: Path) -> Iterator[None]:
        """Notes what is done beyond reading below the folder `inside`."""
        self.events, self._inside = [], inside
        try:
            yield
        finally:
            self._inside = None

    def _note(self, event: str, arguments: tuple) -> None:
        if self._inside is None or self._is_of_datasets(event, arguments):
            return
        if event.startswith(_FORBIDDEN):
            self.events.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = Path(os.path.abspath(os.fsdecode(arguments[0])))  # noqa: PTH100, links are not followed
            neighbor = path.is_relative_to(self._inside.parent) and not path.is_relative_to(self._inside)
            writes = arguments[2] & _WRITING and not str(path).startswith(_INSTALLED)
            foreign = not path.is_relative_to(self._inside) and not str(path).startswith(self._allowed)
            if neighbor or writes or foreign:
                self.events.append(f"opened {path} with flags {arguments[2]}")

    def _is_of_datasets(self, event: str, arguments: tuple) -> bool:
        """Whether something is done to the files that the `datasets` library keeps of its own."""
        match event, arguments:
            case "os.truncate", (int(descriptor), _):
                path = _path_of(descriptor)
            case "os.remove", (str(name), int(folder)) if folder >= 0:
                path = f"{_path_of(folder)}/{name}"
            case _, (str() | bytes() as name, *_):
                path = os.path.abspath(os.fsdecode(name))  # noqa: PTH100
            case _:
                return False
        return path.startswith(self._cache)


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115


def _lines(descriptor: int, patience: float) -> Iterator[str]:
    """The lines that come out of a pipe, as long as each comes within so many seconds."""
    data = b""
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        while select.select([file], [], [], patience)[0] and (part := file.read(1 << 16)):
            *lines, data = (data + part).split(b"\n")
            yield from (line.decode() for line in lines)


def _listing(folder: Path) -> set[tuple[str, tuple[int, ...]]]:
    """Everything below a folder with its kind, size and times; links are not followed."""
    statuses = ((path, path.lstat()) for path in [folder, *folder.rglob("*")])
    return {
        (str(path.relative_to(folder)), (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        for path, status in statuses
    }


def _in_fresh_process(folder: Path) -> list[dict[str, Any]]:
    """Reports of all attacks, executed from a process that has imported the stack and started no threads."""
    command = [sys.executable, "-m", "tests.faults.hostile", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(folder.with_name("datasets"))
    root = Path(__file__).parents[2]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _report_all(folder: Path) -> None:
    """Prints a line of JSON for each attack."""
    from latent_diffusion import runtime

    runtime.start()
    runtime.import_paddlenlp()
    from .attacks import attacks, warm_up

    warm_up()
    table = attacks()
    for attack, outcome in zip(table, attempts(table, folder), strict=True):
        found = {"kind": attack.kind, "attack": f"{attack.kind}, {attack.name}"}
        figures = {"seconds": outcome.seconds, "memory": outcome.memory}
        print(json.dumps(found | figures | {"problems": problems_of(attack, outcome)}), flush=True)


if __name__ == "__main__":
    _report_all(Path(sys.argv[1]).absolute())
