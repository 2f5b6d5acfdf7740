"""Reading `.npy` files that anybody may have made: of numbers only, checked against their size, nothing evaluated."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from .errors import InputError

# As NumPy's own limit; headers of arrays of numbers have 128 bytes.
MAX_HEADER = 10_000
# Bytes of the largest numbers.
MAX_ITEM = 8
_MAGIC = b"\x93NUMPY"
# Version of the format to bytes of the header's length.
_LENGTH_BYTES = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}
_ENTRY = (
    rb"'(descr|fortran_order|shape)'\s*:\s*"
    rb"('[<>|=]?(?:f[248]|[iu][1248])'|True|False|\((?:\d{1,18},\s*)*(?:\d{1,18}\s*)?\))\s*(?:,\s*)?"
)
_HEADER = re.compile(rb"\{\s*(?:" + _ENTRY + rb"){3}\}\s*")


@dataclass(frozen=True)
class ArrayHeader:
    """What the array of an `.npy` file is, and at which byte its data begins."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def parse_header(start: bytes) -> ArrayHeader:
    """The header that the bytes of an `.npy` file start with; of numbers only, and nothing in it is evaluated.

    Raises:
        ValueError: it is damaged, or of an array of anything but numbers.
    """
    version = start[len(_MAGIC) : len(_MAGIC) + 2]
    if not start.startswith(_MAGIC) or version not in _LENGTH_BYTES:
        raise ValueError("it does not begin as an .npy file does")
    begin = len(_MAGIC) + 2 + _LENGTH_BYTES[version]
    end = begin + int.from_bytes(start[len(_MAGIC) + 2 : begin], "little")
    text = start[begin:end]
    if not begin < end <= min(len(start), begin + MAX_HEADER):
        raise ValueError("its header is cut off or too long")
    entries = dict(re.findall(_ENTRY, text)) if _HEADER.fullmatch(text) else {}
    match [entries.get(name, b"") for name in (b"descr", b"fortran_order", b"shape")]:
        case [descr, b"True" | b"False" as order, shape] if descr.startswith(b"'") and shape.startswith(b"("):
            sides = tuple(map(int, re.findall(rb"\d+", shape)))
            return ArrayHeader(sides, np.dtype(descr.decode().strip("'")), order == b"True", end)
    raise ValueError("its header is not that of an array of numbers")


def read_header(file: FileIO) -> ArrayHeader:
    """The header of an open `.npy` file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or the file has not the size that it says.
    """
    header = parse_header(os.pread(file.fileno(), MAX_HEADER, 0))
    check_size(header, os.fstat(file.fileno()).st_size)
    return header


def check_size(header: ArrayHeader, size: int) -> None:
    """Raises `ValueError` unless a file of `size` bytes holds what its header says, and no more."""
    if size != header.file_bytes:
        raise ValueError(f"it has {size} bytes, its header says {header.file_bytes}")


def parse_array(content: bytes) -> np.ndarray:
    """The array of numbers of an `.npy` file, in the machine's byte order; it may not be written into.

    Raises:
        ValueError: it is damaged or holds anything else.
    """
    header = parse_header(content)
    check_size(header, len(content))
    array = np.frombuffer(content, header.dtype, offset=header.offset)
    array = array.reshape(header.shape, order="F" if header.fortran_order else "C")
    return array.astype(header.dtype.newbyteorder("="), copy=False)


@contextlib.contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Around reading the feature file `path`: says in one sentence what is wrong with it.

    Raises:
        InputError: in place of an `OSError` or a `ValueError`.
    """
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"the feature file {path} is missing") from None
    except OSError as error:
        raise InputError(f"cannot read the feature file {path} ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"cannot read the feature file {path} ({error}); extract it again") from None
