"""Commands on a file system that is really full: one sentence, nothing half-written, and on they go when it is not."""

import ctypes
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from dit.configuration import DiTConfig
from dit.modeling import DiT
from latent_diffusion import checkpoint
from latent_diffusion.ema import EMA
from tests.cli.commands import CONVERT, EXTRACT, REPOSITORY, TINY
from tests.conftest import write_vae

from .kills import Kind, wait_for
from .runs import Server, run_script

CASES = ("extraction", "packed extraction", "samples", "export", "grid", "trainer 1", "loop 1")

# Bytes of the file system, and those that are free when a command runs for the first time, for the second, ...
DISK, FREE = 16 << 20, (0, 20_000, 60_000)

# Steps of training, which take longer than the disk is full.
LONG = 300

# From Linux's sched.h and mount.h.
_CLONE_NEWNS, _MS_PRIVATE_REC = 0x20000, (1 << 18) | (1 << 14)


class FullDisk:
    """A small file system of its own, in the memory of the machine; for a process that may make one (root, Linux).

    Args:
        folder: where it is, for this process and those that it starts; empty.
    """

    def __init__(self, folder: Path):
        self.folder, self._filler = folder, folder / "filler"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS) or libc.mount(None, b"/", None, _MS_PRIVATE_REC, None):
            raise PermissionError(ctypes.get_errno(), "no file systems can be made here")
        if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={DISK}".encode()):
            raise PermissionError(ctypes.get_errno(), "no file systems can be made here")

    def fill(self, free: int = 0) -> None:
        """Takes all space but so many bytes."""
        space = os.statvfs(self.folder)
        with suppress(OSError):  # others may be writing, too
            self._filler.write_bytes(b"x" * (space.f_bavail * space.f_frsize - free))

    def empty(self) -> None:
        """Gives the space back."""
        self._filler.unlink()


def run_all(server: Server, kinds: dict[str, Kind], folder: Path, names: Sequence[str] = CASES) -> int:
    """Runs cases one after the other; returns how many, 0 where no file systems can be made.

    Raises:
        AssertionError: a case failed; stderr says why.
    """
    folder.mkdir()
    if server.call(_make_disk, folder) != 0:
        return 0
    vae, weights = write_vae(folder / "vae"), _write_weights(folder / "weights")
    for name in names:
        work = folder / name.replace(" ", "_")
        work.mkdir()
        assert server.call(check, name, kinds, vae, weights, work) == 0, f"{name} on a full disk is not as it should be"
        print(f"{name} on a full disk: one sentence or going on, and fine afterwards", flush=True)
    return len(names)


def _write_weights(folder: Path) -> Path:
    folder.mkdir()
    model = DiT(DiTConfig.from_dict(TINY))
    checkpoint.write_weights(folder, model, EMA(model, 0.5))
    return folder


def _make_disk(folder: Path) -> None:
    FullDisk(folder)


def check(name: str, kinds: dict[str, Kind], vae: Path, weights: Path, work: Path) -> None:
    """A case, for a process of its own that has imported the stack."""
    mount = work / "disk"
    mount.mkdir()
    disk = FullDisk(mount)
    if name in kinds:
        _check_training(disk, kinds[name], mount / "run")
    else:
        command, final = _commands(work, mount, vae, weights)[name]
        _check_command(disk, command, final, work / "output")


def _commands(work: Path, mount: Path, vae: Path, weights: Path) -> dict[str, tuple[list[str], str]]:
    """Commands that write onto the disk, and a pattern of the file or folder there that is to appear."""
    images = work / "images"
    rng = np.random.default_rng(0)
    for i in range(24):
        path = images / f"{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    extract = [EXTRACT, "--data-path", images, "--vae", vae, "--image-size", 64, "--batch-size", 4, "--features-path"]
    sample = [REPOSITORY / "sample_ddp.py", "--ckpt", weights, "--vae", vae, "--num-sampling-steps", 2]
    sample += ["--num-fid-samples", 24, "--per-proc-batch-size", 8, "--image-size", 64, "--cfg-scale", 1]
    export = [CONVERT, "--model_file", weights / checkpoint.MODEL, "--vae_name_or_path", vae, "--output_path"]
    grid = [REPOSITORY / "sample.py", "--ckpt", weights, "--vae", vae, "--num-sampling-steps", 2, "--image-size", 64]
    return {
        "extraction": (_words(*extract, mount / "files"), "files/imagenet64_manifest.json"),
        "packed extraction": (_words(*extract, mount / "packed", "--layout", "packed"), "packed"),
        "samples": (_words(*sample, "--sample-dir", mount / "samples"), "samples/*.npz"),
        "export": (_words(*export, mount / "export"), "export"),
        "grid": (_words(*grid, "--output", mount / "grid.png"), "grid.png"),
    }


def _words(*words: object) -> list[str]:
    return [str(word) for word in words]


def _check_command(disk: FullDisk, words: list[str], final: str, output: Path) -> None:
    """The command fails in one sentence where there is no space, or not enough, and works when there is."""
    for free in FREE:
        disk.fill(free)
        code, out = _run_here(words, disk.folder, output)
        disk.empty()
        if code == 0 and free:  # it fits
            return
        where = f"with {free} bytes free: {out}"
        errors = [line for line in out.splitlines() if line.startswith("error: ")]
        assert code == 1 and len(errors) == 1 and "Traceback" not in out, where
        assert "No space left on device" in errors[0] and str(disk.folder) in errors[0], where
        assert not _is_finished(disk.folder, final), f"{where} left {final}"
    code, out = _run_here(words, disk.folder, output)
    assert code == 0 and _is_finished(disk.folder, final), f"cannot go on: {out}"


def _is_finished(folder: Path, final: str) -> bool:
    """Whether it is there; the manifest of features is written at once, and gets a checksum at the end."""
    return any(path.suffix != ".json" or '"sha256"' in path.read_text() for path in folder.glob(final))


def _check_training(disk: FullDisk, kind: Kind, folder: Path) -> None:
    """Training, with its checkpoints, curves and output on a disk that is full for a while, ends well."""
    from visualdl import LogReader

    folder.mkdir()
    disk.fill(free=100_000)
    saving = "--save_steps" if kind.name == "trainer" else "--ckpt-every"
    command = kind.command(folder, "--max_steps", LONG, saving, LONG // 10)
    pid = _fork(command.arguments, folder, folder / "output")
    wait_for(lambda: any(folder.rglob(".checkpoint-*")))
    disk.empty()
    disk.fill()
    time.sleep(2.0)
    disk.empty()
    is_running = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    code, out = _end_of(pid), (folder / "output").read_text()
    assert is_running and code == 0 and "Traceback" not in out, out
    newest = kind.newest(folder)
    assert newest is not None and newest.name == f"checkpoint-{LONG}", out
    for log in folder.rglob("vdlrecords*"):
        LogReader(file_path=str(log)).get_tags()


def _run_here(words: list[str], folder: Path, output: Path) -> tuple[int, str]:
    """Runs a script in a fork of this process; returns its exit status and what it printed."""
    code = _end_of(_fork(words, folder, output))
    return code, output.read_text()


def _fork(words: list[str], folder: Path, output: Path) -> int:
    output.write_bytes(b"")
    pid = os.fork()
    if pid == 0:
        run_script(words, folder, {}, output)
    return pid


def _end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
