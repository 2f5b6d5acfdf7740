"""Images in tar shards as WebDataset lays them out, read by index.

Members of one sample share the name up to its first dot, its key: `n01440764_10026.jpg` and `n01440764_10026.cls`,
whose text is the class number. What follows the last dot is a member's kind. A shuffled, resumable stream needs random
access: the positions of all images are found once, at the start, by walking through the headers of the shards.
"""

import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np

from .errors import InputError
from .images import EXTENSIONS
from .progress import progress
from .reading import naming_errors, open_regular

# Headers that describe the next one, and the most bytes of them: paths have at most 4096.
_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_LONGEST_NAME = 1 << 13

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
        """The encoded image; `InputError` if the shard cannot be read any more."""
        shard, size = self.shards[self._shard[index]], int(self._size[index])
        with naming_errors(shard), open_regular(shard) as file:
            data = os.pread(file.fileno(), size, int(self._offset[index]))
        if len(data) != size:
            raise InputError(f"the tar shard {shard} was cut off after it had been opened")
        return data


def _index(path: Path) -> list[tuple[int, int, int]]:
    """Offset, size and class of every image of one shard."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with (
            io.BufferedReader(open_regular(path)) as file,
            tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as tar,
        ):
            for member in tar:
                _check_size(member)
                if member.isdir() or member.isdev():
                    continue
                key, kind = _split(member.name)
                if f".{kind}" in EXTENSIONS:
                    _check_member(path, member, is_second=key in images)
                    images[key] = (member.offset_data, member.size)
                elif kind == "cls":
                    _check_member(path, member, is_second=key in labels)
                    labels[key] = _label(path, tar, member)
            _check_end(tar)
    except InputError:
        raise
    except Exception as error:  # a damaged header can make tarfile raise anything
        raise InputError(f"cannot read the tar shard {path}: {' '.join(str(error).split())}") from None
    if missing := [key for key in images if key not in labels]:
        raise InputError(f"{path} holds the image {missing[0]!r} without its class: {missing[0]}.cls is missing")
    if lone := [key for key in labels if key not in images]:
        raise InputError(
            f"{path} holds the class {lone[0]}.cls without an image ({', '.join(EXTENSIONS)}); add it or leave both out"
        )
    return [(*place, labels[key]) for key, place in images.items()]


class _Member(tarfile.TarInfo):
    """Refuses what tarfile would take memory for, or walk through in circles."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        _check_size(member)
        if member.type in _EXTENDED and member.size > _LONGEST_NAME:
            raise ValueError(f"the name or the attributes of a member have {member.size} bytes")
        return member


def _check_size(member: tarfile.TarInfo) -> None:
    """An extended header can change the size that `_Member` has seen."""
    if member.size < 0:
        raise ValueError(f"{member.name!r} has {member.size} bytes")


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes a damaged header, or the place where a file was cut off, for the end."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"it is damaged or cut off at byte {tar.offset}")


def _split(name: str) -> tuple[str, str]:
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


def _check_member(path: Path, member: tarfile.TarInfo, is_second: bool) -> None:
    if member.islnk() or member.issym():
        raise InputError(f"{member.name} in {path} is a link; pack the files themselves")
    if not member.isreg() or member.issparse():
        raise InputError(f"{member.name} in {path} is no plain file; pack it again")
    if is_second:
        raise InputError(
            f"{member.name} in {path} is the second of its kind with that name up to the first dot; a sample "
            "has one image and one class"
        )


def _label(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    text = tar.extractfile(member).read(2 * _LABEL_SIZE).strip()
    if not text.isdigit() or len(text) > _LABEL_SIZE:
        raise InputError(f"{member.name} in {path} does not hold a class number: {text[:20]!r}")
    return int(text)
