"""VisualDL's curves on a disk that fails: records are lost whole, and the run goes on."""

import os
import sys

from visualdl.io import bfile


def outlive_failing_disk() -> None:
    """From now on VisualDL loses what cannot be written, and says so once.

    Its own way: a part of a record stays in the file, and none after it can be read; and where the standard output
    cannot be written either, its thread ends, and the training waits for it forever.
    """
    bfile.default_file_factory.register_filesystem("", _WholeRecords())


class _WholeRecords(bfile.LocalFileSystem):
    """Appends to a file all that is given or nothing."""

    def __init__(self):
        super().__init__()
        self._has_warned = False

    def append(self, filename: str, file_content: bytes, binary_mode: bool = False) -> None:
        try:
            os.makedirs(os.path.dirname(filename), exist_ok=True)  # noqa: PTH103, PTH120, VisualDL's paths are texts
            _append(filename, file_content)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                print(f"warning: curves are being lost: {error.strerror}: {filename}", file=sys.stderr, flush=True)

    write = append


def _append(filename: str, content: bytes) -> None:
    with open(filename, "ab", buffering=0) as file:  # noqa: PTH123
        size = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise
