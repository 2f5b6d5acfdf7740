"""Records as `.npy` files of their own: what the layouts that keep them so share."""

import hashlib
import io
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import naming_file
from .progress import progress
from .records import Contents, RecordWriter, claim_manifest, write_manifest


class ArrayFilesWriter(RecordWriter):
    """Writes each record into one or more `.npy` files.

    Files are not flushed to the disk one by one, which would take longer than the encoding. What a power failure leaves
    of them is shorter than it should be, so a record is there when all of its files have their full size.

    Args:
        folders: where the files are; their parent folder is the manifest's.
        manifest: its path.
        contents: of the records.
    """

    def __init__(self, folders: Sequence[Path], manifest: Path, contents: Contents):
        super().__init__(contents)
        self.folders, self.manifest, self.folder = folders, manifest, manifest.parent

    @abstractmethod
    def files(self, number: int) -> dict[Path, int]:
        """The files of a record and their full sizes in bytes, in the order in which they are written."""

    def claim(self) -> None:
        claim_manifest(self.manifest, self.contents.to_dict())
        for folder in self.folders:
            folder.mkdir(exist_ok=True)

    def absent(self) -> list[int]:
        return [number for number in range(self.contents.records) if not self._is_there(number)]

    def finish(self, skipped: list[str]) -> None:
        numbers = sorted(set(range(self.contents.records)) - set(self.absent()))
        digest = hashlib.sha256()
        with progress(len(numbers), "checksum", self.contents.unit) as bar:
            for number in numbers:
                for path in self.files(number):
                    digest.update(path.read_bytes())
                bar.update()
        found = {f"{self.contents.unit}s": len(numbers), "skipped": skipped, "sha256": digest.hexdigest()}
        write_manifest(self.manifest, self.contents.to_dict() | found)

    def _is_there(self, number: int) -> bool:
        return all(_size(path) == size for path, size in self.files(number).items())


def array_file(array: np.ndarray) -> bytes:
    """The content of the `.npy` file of an array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_file(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name when it is complete; it may not survive a power failure."""
    # The name is the same at every try: what a killed process leaves is written over.
    temporary = path.with_name(f".{path.stem}.tmp")
    try:
        with naming_file(path):
            temporary.write_bytes(content)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk its space is needed
        raise


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
