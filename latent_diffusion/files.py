"""Files and folders that appear under their final name only when they are complete."""

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .errors import InputError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, makes it durable, and renames it to `path`.

    On failure the temporary file is removed and `path` is as before.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
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

    On failure it is removed and `path` is as before. Its name is the same at every try, so that what a killed process
    leaves is removed by the next one.

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
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_folder(temporary: Path, path: Path) -> None:
    """Makes all files of `temporary` durable and renames it to `path`, replacing a folder of that name.

    On failure `path` is as before.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            sync(file)
    replaced = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # of a killed run
        path.rename(replaced)
    try:
        temporary.rename(path)
    except BaseException:
        if replaced.exists():
            replaced.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of files: by number where all are numbers but for the suffix, else by text."""
    stems = {name: os.path.splitext(name)[0] for name in names}  # noqa: PTH122, faster than a Path for each
    if all(stem.isdecimal() for stem in stems.values()):
        return sorted(stems, key=lambda name: (int(stems[name]), name))
    return sorted(stems)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without white space around them.

    Raises:
        InputError: it cannot be read or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
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
