"""Every point at which a process can be killed while it replaces files or folders, and what a power loss leaves."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import shim
from .runs import Server

# Killing cannot need more calls than that.
MOST_CALLS = 500

CHECKPOINT_FILES = ("model_state.pdparams", "optimizer.pdopt")


@dataclass(frozen=True)
class Case:
    """Something that replaces something.

    Attributes:
        prepare: makes what is there before, in an empty folder.
        act: replaces it; it runs in a process that may be killed.
        found: what a later process finds in the folder: "old" or "new"; raises AssertionError for anything else.
        is_flushed: whether the new one survives a loss of power as soon as `act` returns.
    """

    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    found: Callable[[Path], str]
    is_flushed: bool = True


def save_checkpoint(folder: Path, step: int, keep: int | None) -> None:
    """Saves a checkpoint of a few small files, each of which holds the step."""
    from latent_diffusion import checkpoint
    from latent_diffusion.weights import write_paddle

    def write(target: Path) -> None:
        for name in CHECKPOINT_FILES:
            write_paddle(target / name, {"value": np.full((64, 64), step, np.float32)})
        (target / checkpoint.TRAINER_STATE).write_text(json.dumps({"global_step": step}))

    progress = checkpoint.Progress(step, 8 * step, 0)
    checkpoint.save(folder / f"checkpoint-{step}", write, progress, lambda: 0, keep)


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint.

    Raises:
        AssertionError: a folder with the name of a checkpoint is not whole, or holds those of two.
    """
    from latent_diffusion import checkpoint
    from latent_diffusion.weights import read_paddle

    for path in checkpoint.checkpoints(folder):
        checkpoint.verify(path)
        step = int(path.name.removeprefix("checkpoint-"))
        assert checkpoint.read_progress(path).step == step, f"{path} says another step"
        for name in CHECKPOINT_FILES:
            assert (read_paddle(path / name)["value"] == step).all(), f"{path / name} is of another step"
    newest = checkpoint.newest_checkpoint(folder, checkpoint.verify)
    return None if newest is None else checkpoint.read_progress(newest).step


def _saving(earlier: tuple[int, ...], step: int, keep: int | None) -> Case:
    def prepare(folder: Path) -> None:
        for number in earlier:
            save_checkpoint(folder, number, None)

    def act(folder: Path) -> None:
        from latent_diffusion import checkpoint

        checkpoint.remove_partial(folder)
        save_checkpoint(folder, step, keep)

    def found(folder: Path) -> str:
        return {max(earlier, default=None): "old", step: "new"}[newest_step(folder)]

    return Case(prepare, act, found)


def _replace_folder(folder: Path, value: int) -> None:
    from latent_diffusion.files import new_folder

    with new_folder(folder / "best", marker="a.json") as target:
        (target / "inner").mkdir()
        for name in ("a.json", "b.json", "inner/c.json"):
            (target / name).write_text(json.dumps(value))


def _found_folder(folder: Path) -> str:
    from latent_diffusion.files import recover_folder

    recover_folder(folder / "best")
    files = sorted(path for path in (folder / "best").rglob("*") if path.is_file())
    values = {json.loads(path.read_text()) for path in files}
    assert len(files) == 3 and len(values) == 1, f"{folder / 'best'} is neither the old folder nor the new one"
    return "old" if values == {1} else "new"


def _replace_file(folder: Path, value: int) -> None:
    from latent_diffusion.files import replace_file

    replace_file(folder / "file.json", lambda path: path.write_text(json.dumps([value] * 100)))


def _found_file(folder: Path) -> str:
    values = json.loads((folder / "file.json").read_text())
    assert len(values) == 100 and len(set(values)) == 1
    return "old" if values[0] == 1 else "new"


CASES = {
    "first checkpoint": _saving((), 1, None),
    "next checkpoint": _saving((1,), 2, None),
    "checkpoint that replaces the only one": _saving((1,), 2, 1),
    "checkpoint that replaces the oldest": _saving((1, 2), 3, 2),
    "checkpoint again": _saving((1, 2), 2, None),
    "folder": Case(lambda f: _replace_folder(f, 1), lambda f: _replace_folder(f, 2), _found_folder),
    "file": Case(lambda f: _replace_file(f, 1), lambda f: _replace_file(f, 2), _found_file, is_flushed=False),
}


def act(name: str, folder: Path, variables: dict[str, str]) -> None:
    """What the processes do that are killed."""
    os.environ.update(variables)
    CASES[name].act(folder)


def kill_everywhere(server: Server, name: str, root: Path, stride: int = 1) -> dict[str, int]:
    """Kills what a case does at its first, second, ... call on files, each time from the same state.

    Args:
        server: has the shim.
        name: of the case.
        root: an empty folder.
        stride: kill at every so many calls only.

    Returns:
        "points" at which it was killed, and how often "old" and "new" was found afterwards.

    Raises:
        AssertionError: something else was found, or doing it again fails.
    """
    case, counts = CASES[name], {"points": 0, "old": 0, "new": 0}
    for number in range(1, MOST_CALLS, stride):
        folder = root / str(number)
        folder.mkdir(parents=True)
        case.prepare(folder)
        fault = shim.Fault(f"{folder}*", kill_at=number)
        if server.call(act, name, folder, fault.variables()) != -signal.SIGKILL:
            return counts
        where = f"{name}, killed at call {number}"
        found = case.found(folder)
        counts["points"] += 1
        counts[found] += 1
        assert found == "new" or counts["new"] == 0, f"{where}: old after new"
        assert server.call(act, name, folder, {}) == 0, f"{where}: cannot be done again"
        assert case.found(folder) == "new", f"{where}: done again, and not found"
        left = [path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock"]
        assert not left or name == "file", f"{where}: {left} stays behind"
    raise AssertionError(f"{name}: still killed at call {number}")


def logged(server: Server, name: str, root: Path) -> list[shim.Call]:
    """The calls of a case that nothing disturbs."""
    folder, log = root / "work", root / "log"
    folder.mkdir(parents=True)
    CASES[name].prepare(folder)
    assert server.call(act, name, folder, shim.Fault(f"{folder}*", log=log).variables()) == 0
    return [call for call in shim.read_log(log) if call.result >= 0]


class Volatile:
    """What a loss of power would take: files and entries of folders that were changed since they were last flushed."""

    def __init__(self):
        self.paths: set[str] = set()

    def apply(self, call: shim.Call) -> None:
        """Takes a call into account."""
        if call.name in ("fsync", "fdatasync"):
            self.paths.discard(call.path)
        elif call.name == "write":
            self.paths.add(call.path)
        elif call.name == "rename":
            moved = {path for path in self.paths if path == call.path or path.startswith(call.path + "/")}
            self.paths = (self.paths - moved) | {call.other + path.removeprefix(call.path) for path in moved}
            self.paths |= {os.path.dirname(call.path), os.path.dirname(call.other)}  # noqa: PTH120, paths of a log
        elif call.name in ("open", "mkdir"):
            self.paths |= {call.path, os.path.dirname(call.path)}  # noqa: PTH120

    def below(self, folder: str) -> set[str]:
        """Those in a folder, and itself."""
        return {path for path in self.paths if path == folder or path.startswith(folder + "/")}


def check_durability(name: str, calls: list[shim.Call], folder: Path) -> None:
    """Raises AssertionError where a loss of power could leave a published file or folder that is not whole.

    All below a name must be on the disk before that is given its final name, and the manifest must be written last. The
    folder around it must be flushed at the end, unless the case says otherwise, and before anything former is removed.
    """
    volatile, published, removed = Volatile(), False, False
    for call in calls:
        if published and not removed and _removes(call):
            removed = True
            assert str(folder) not in volatile.paths, f"{call.path} is removed before {folder} is on the disk"
        if call.name == "rename" and Path(call.other).parent == folder and not _removes(call):
            lost = volatile.below(call.path)
            assert not lost, f"{call.path} gets its final name before {sorted(lost)} are on the disk"
            published = True
        volatile.apply(call)
    writes = [call.path for call in calls if call.name == "write" and ".checkpoint-" in call.path]
    assert not writes or writes[-1].endswith("/manifest.json"), "the manifest is not written last"
    assert published, "nothing was given its final name"
    is_flushed = removed or str(folder) not in volatile.paths
    assert is_flushed or not CASES[name].is_flushed, f"{folder} is not on the disk at the end"


def _removes(call: shim.Call) -> bool:
    return call.name in ("unlink", "unlinkat", "rmdir") or (call.name == "rename" and call.other.endswith(".partial"))


def run(folder: Path, scale: float) -> dict[str, int | float | str]:
    """Kills at every point of every case, and looks at the order of the calls of each; see the package."""
    server, figures = Server(), {"points": 0, "old": 0, "new": 0}
    for name in CASES:
        root = folder / name.replace(" ", "_")
        counts = kill_everywhere(server, name, root, stride=max(1, round(1 / scale)))
        check_durability(name, logged(server, name, root / "logged"), root / "logged" / "work")
        print(f"{name}: {counts}", flush=True)
        figures = {key: figures[key] + counts[key] for key in figures}
    return {"cases": len(CASES), **figures}
