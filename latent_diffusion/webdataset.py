"""Images in tar shards as WebDataset lays them out, read by index.

Members of one sample share the name up to its first dot, its key: `n01440764_10026.jpg` and `n01440764_10026.cls`,
whose text is the class number. What follows the last dot is a member's kind. A shuffled, resumable stream needs random
access: the positions of all images are found once, at the start, by walking through the headers of the shards.
"""

import re
import tarfile
from pathlib import Path

import numpy as np

from .errors import InputError
from .images import EXTENSIONS
from .progress import progress

# More digits than the number of any class has.
_LABEL_SIZE = 9

# Key and kind; as in WebDataset, hidden files and names without a dot are of no sample.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.(?:[^/]*\.)?([^./]+)", re.DOTALL)


def list_shards(path: Path) -> list[Path]:
    """The `.tar` files of a folder, sorted, or the one that `path` is; none where it is neither."""
    return [path] if path.suffix == ".tar" and path.is_file() else sorted(path.glob("*.tar"))


class TarImages:
    """The encoded images of the `.tar` files of a folder, or of one such file.

    Attributes:
        labels: int64 [N], the class numbers.

    Raises:
        InputError: a shard cannot be read, has an image or a class without the other, two of one sample, or a link.
    """

    def __init__(self, path: Path):
        self.shards = list_shards(path)
        shard, offset, size, labels = [], [], [], []
        with progress(total=len(self.shards), desc="index tar shards", unit="shard") as bar:
            for number, tar in enumerate(self.shards):
                for start, length, label in _index(tar):
                    shard.append(number)
                    offset.append(start)
                    size.append(length)
                    labels.append(label)
                bar.update()
        if not labels:
            raise InputError(f"the tar shards of {path} hold no images with classes (name.jpg and name.cls)")
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
                if member.isdir() or member.isdev():
                    continue
                key, kind = _split(member.name)
                if f".{kind}" in EXTENSIONS:
                    _check_member(path, member, is_second=key in images)
                    images[key] = (member.offset_data, member.size)
                elif kind == "cls":
                    _check_member(path, member, is_second=key in labels)
                    labels[key] = _label(path, tar, member)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(f"cannot read the tar shard {path}: {error}") from None
    if missing := [key for key in images if key not in labels]:
        raise InputError(f"{path} holds the image {missing[0]!r} without its class: {missing[0]}.cls is missing")
    if lone := [key for key in labels if key not in images]:
        raise InputError(
            f"{path} holds the class {lone[0]}.cls without an image ({', '.join(EXTENSIONS)}); add it or leave both out"
        )
    return [(*place, labels[key]) for key, place in images.items()]


def _split(name: str) -> tuple[str, str]:
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


def _check_member(path: Path, member: tarfile.TarInfo, is_second: bool) -> None:
    if member.islnk() or member.issym():
        raise InputError(f"{member.name} in {path} is a link; pack the files themselves")
    if is_second:
        raise InputError(
            f"{member.name} in {path} is the second of its kind with that name up to the first dot; a sample has one "
            "image and one class"
        )


def _label(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    text = tar.extractfile(member).read(2 * _LABEL_SIZE).strip()
    if not text.isdigit() or len(text) > _LABEL_SIZE:
        raise InputError(f"{member.name} in {path} does not hold a class number: {text[:20]!r}")
    return int(text)
