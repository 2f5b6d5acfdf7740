"""Files and folders that appear under their final name only when they are complete."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from .errors import InputError, naming_file
from .reading import MAX_TEXT, open_regular, read_bytes

# From Linux's fcntl.h and fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

_LOCK = ".lock"

# Bytes that are read at a time for a checksum.
_BLOCK = 1 << 20


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, makes it durable, and renames it to `path`.

    On failure the temporary file is removed and `path` is as before; an `OSError` names it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming_file(path):
            write(temporary)
            sync(temporary)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """As `replace_file`, for a file that a user names: makes its folder, and says in one sentence what goes wrong.

    Raises:
        InputError: the file or its folder cannot be made.
    """
    with preparing_folder(path.absolute().parent):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)


def write_json(path: Path, values: dict) -> None:
    """Writes a JSON object, indented; not at once, so into a folder that is not there under its name yet."""
    path.write_text(json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def preparing_folder(path: Path) -> Iterator[None]:
    """Around what makes the folder `path` and its first files: says in one sentence that it cannot be done.

    Raises:
        InputError: the system refuses it, or the folder is there and nothing can be written into it.
    """
    try:
        yield
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(
            f"cannot make or write into the folder {path} ({error.strerror}); choose another folder"
        ) from None


@contextlib.contextmanager
def new_folder(path: Path, marker: str) -> Iterator[Path]:
    """Yields a temporary folder beside `path` to be filled; on success it takes the place of `path`.

    On failure it is removed and `path` is as before; an `OSError` names it. Its name is the same at every try, so that
    what a killed process leaves is removed by the next one.

    Args:
        path: the folder; it may exist if it is empty or an older one of its kind.
        marker: a file that every folder of this kind holds.

    Raises:
        InputError: `path` is a file, or a folder that holds something else, which would be lost; or it cannot be made.
    """
    path = path.absolute()
    if path.exists() and not (path / marker).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(
            f"{path} exists and holds no {marker}: it would be replaced; choose another folder or remove it"
        )
    temporary = path.with_name(f".{path.name}.partial")
    with preparing_folder(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(path)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
    try:
        with naming_file(path):
            yield temporary
            for file in filter(Path.is_file, temporary.rglob("*")):
                set_usual_mode(file)
            publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_apart(path: Path, *sources: str | Path) -> None:
    """Raises `InputError` if a source lies in a folder that is to be replaced, or is that folder."""
    for source in sources:
        if Path(source).exists() and Path(source).resolve().is_relative_to(path.resolve()):
            raise InputError(f"{path} would be replaced, and {source} is in it; choose another folder to write")


def set_usual_mode(file: Path) -> None:
    """Gives a file the permissions that new files have: safetensors makes its own for the user's eyes only."""
    os.umask(mask := os.umask(0))
    file.chmod(0o666 & ~mask)


def publish_folder(temporary: Path, path: Path) -> None:
    """Makes all of `temporary` durable and renames it to `path`, replacing a folder of that name.

    Whenever the process or the machine stops, `path` is the former folder or the new one, whole: both change places in
    one step where the file system can do that (Linux, not on NFS; elsewhere there is a moment without a `path`, and the
    former one is beside it, under a name that begins with a dot). On failure `path` is as before.
    """
    for entry in temporary.rglob("*"):
        sync(entry)
    sync(temporary)
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        _replace_in_two_steps(temporary, path)
    sync(path.parent)
    shutil.rmtree(temporary, ignore_errors=True)  # after an exchange: the former one


def _exchange(one: Path, other: Path) -> bool:
    """Lets two paths change places in one step; False where the system cannot do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux has it, other systems have not
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _replace_in_two_steps(temporary: Path, path: Path) -> None:
    former = _former(path)
    path.rename(former)
    try:
        temporary.rename(path)
    except BaseException:
        former.rename(path)
        raise
    shutil.rmtree(former, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Brings back the folder `path` if a process was killed between the two steps of replacing it."""
    former = _former(path)
    if not path.exists() and former.exists():
        former.rename(path)
    shutil.rmtree(former, ignore_errors=True)


def _former(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


@contextlib.contextmanager
def locked_folder(path: Path, patience: float = 120.0) -> Iterator[None]:
    """Within the context no other process can lock the folder `path`; the system unlocks it when this process ends.

    Args:
        path: made if it is not there.
        patience: seconds to wait for a process that is about to end.

    Raises:
        InputError: another process keeps it locked; or the folder cannot be made or written.
    """
    is_new = not path.exists()
    with preparing_folder(path):
        path.mkdir(parents=True, exist_ok=True)
        (path / _LOCK).touch()
    with (path / _LOCK).open("r+") as file:
        if not _lock(file):
            _wait_for(file, path, patience)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        except BaseException:
            if is_new and os.listdir(path) == [_LOCK]:  # noqa: PTH208, nothing came of it
                (path / _LOCK).unlink()
                path.rmdir()
            raise


def _wait_for(file: TextIO, path: Path, patience: float) -> None:
    """Locks a file when the process that has locked it lets go of it."""
    holder, deadline = file.read().strip(), time.monotonic() + patience
    print(f"waiting up to {patience:g} s for {holder}, which is writing into {path}", file=sys.stderr, flush=True)
    while not _lock(file):
        if time.monotonic() > deadline:
            raise InputError(f"{holder} is writing into {path}; stop it, or choose another folder")
        time.sleep(0.1)
    file.seek(0)


def _lock(file: TextIO) -> bool:
    """Locks an open file; False where another process has done so."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
            raise
    return True


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def in_order(names: Iterable[str]) -> list[str]:
    """Names of files: by number where all are numbers but for the suffix, else by text."""
    names = list(names)
    stems = [name.rpartition(".")[0] or name for name in names]
    if all(map(str.isdecimal, stems)):
        # Half of the time that a key of each of a million names takes.
        return [name for _, name in sorted(zip(map(int, stems), names, strict=True))]
    return sorted(names)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without white space around them.

    Raises:
        InputError: it cannot be read or is not UTF-8.
    """
    try:
        text = read_bytes(path, MAX_TEXT).decode()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    # A text may hold characters that `splitlines` takes for the end of a line.
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
