"""Images in tar shards as WebDataset lays them out, read by index.

Members of one sample share the name up to its first dot and follow each other: `n01440764_10026.jpg` and
`n01440764_10026.cls`, whose text is the class number. A shuffled, resumable stream needs random access: the positions
of all images are found once, at the start, by walking through the headers of the shards.
"""

import tarfile
from pathlib import Path

import numpy as np

from .errors import InputError
from .images import EXTENSIONS
from .progress import progress

# More digits than the number of any class has.
_LABEL_SIZE = 9


class TarImages:
    """The encoded images of the `.tar` files of a folder.

    Attributes:
        labels: int64 [N], the class numbers.

    Raises:
        InputError: a shard cannot be read, or an image in it has no class.
    """

    def __init__(self, folder: Path):
        self.shards = sorted(folder.glob("*.tar"))
        shard, offset, size, labels = [], [], [], []
        with progress(total=len(self.shards), desc="index tar shards", unit="shard") as bar:
            for number, path in enumerate(self.shards):
                for start, length, label in _index(path):
                    shard.append(number)
                    offset.append(start)
                    size.append(length)
                    labels.append(label)
                bar.update()
        if not labels:
            raise InputError(f"the tar shards in {folder} hold no images with classes (name.jpg and name.cls)")
        # Arrays rather than lists of tuples: millions of images, in each of several loader processes.
        self._shard, self._offset, self._size = np.array(shard, np.int32), np.array(offset), np.array(size)
        self.labels = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Says in an error which image is meant."""
        return f"{self.shards[self._shard[index]]} (the image at byte {self._offset[index]})"

    def read(self, index: int) -> bytes:
        """The encoded image."""
        with self.shards[self._shard[index]].open("rb") as file:
            file.seek(self._offset[index])
            return file.read(self._size[index])


def _index(path: Path) -> list[tuple[int, int, int]]:
    """Offset, size and class of every image of one shard."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, _, suffix = _split(member.name)
                if f".{suffix.lower()}" in EXTENSIONS:
                    images[key] = (member.offset_data, member.size)
                elif suffix == "cls":
                    labels[key] = _label(path, tar, member)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(f"cannot read the tar shard {path}: {error}") from None
    if missing := [key for key in images if key not in labels]:
        raise InputError(f"{path} holds the image {missing[0]!r} without its class: {missing[0]}.cls is missing")
    return [(*place, labels[key]) for key, place in images.items()]


def _split(name: str) -> tuple[str, str, str]:
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", dot, suffix


def _label(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    text = tar.extractfile(member).read(2 * _LABEL_SIZE).strip()
    if not text.isdigit() or len(text) > _LABEL_SIZE:
        raise InputError(f"{member.name} in {path} does not hold a class number: {text[:20]!r}")
    return int(text)
