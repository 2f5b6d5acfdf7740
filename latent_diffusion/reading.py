"""Reading files that anybody may have made: whatever lies under a name, reading ends, and memory is bounded."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from .errors import InputError

# Bytes of a text or a configuration that is made by hand.
MAX_TEXT = 1 << 24


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Around what reads the file or folder `path`: says in one sentence what the system refuses.

    Raises:
        InputError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror or error}") from None


def open_regular(path: Path) -> FileIO:
    """Opens a file to read its bytes; whatever is no regular file is refused: a pipe would block, a device never end.

    Raises:
        OSError: it cannot be opened, or is none.
    """
    file = open(path, "rb", buffering=0, opener=_open_at_once)  # noqa: PTH123, SIM115, `Path.open` takes no opener
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is larger, or no regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than the {limit} that are read", str(path))
        content = file.read(size)
    if len(content) != size:
        raise OSError(errno.EIO, f"{len(content)} of {size} bytes could be read", str(path))
    return content


def parse_json(content: bytes) -> Any:
    """A value from its JSON text in UTF-8.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(content.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, limit: int = MAX_TEXT) -> Any:
    """The value in a JSON file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is larger, or no regular file.
        ValueError: it is no JSON, or nested too deeply.
    """
    return parse_json(read_bytes(path, limit))
