"""Arrays in `.npz` files: what they are is checked before memory is taken for them, and nothing in them is executed."""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import InputError
from ..reading import open_regular

SUFFIX = ".npz"

# Those of `numpy.savez` and `numpy.savez_compressed`; others can make far more of a byte.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class Header:
    """What an array is, and where in its member of the archive the data begins."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def is_npz(path: Path) -> bool:
    """Whether a path has the name of such a file and is one that can be opened."""
    return path.suffix == SUFFIX and path.is_file() and zipfile.is_zipfile(path)


def array_names(path: Path) -> set[str]:
    """Names of the arrays of a file.

    Raises:
        InputError: it cannot be read.
    """
    with _reading(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}


def array_header(path: Path, name: str) -> Header:
    """What the array `name` of a file is.

    Raises:
        InputError: there is none, or it is damaged.
    """
    with opened_array(path, name) as (_, header):
        return header


def read_array(path: Path, name: str) -> np.ndarray:
    """The array `name` of a file. Its size is what `array_header` says, which the caller has checked.

    Raises:
        InputError: there is none, or it is damaged.
    """
    with opened_array(path, name) as (stream, header):
        values = np.frombuffer(stream.read(header.bytes), header.dtype)
        return values.reshape(header.shape, order="F" if header.fortran_order else "C")


@contextlib.contextmanager
def opened_array(path: Path, name: str) -> Iterator[tuple[BinaryIO, Header]]:
    """Around reading the array `name`: gives its data as a stream that can be positioned, and its header.

    Raises:
        InputError: there is no such array, it holds objects, or it is damaged.
    """
    with _reading(path, name), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type not in _COMPRESSIONS:
            raise ValueError("it is compressed in a way that NumPy never does")
        with archive.open(member) as stream:
            header = _read_header(stream)
            if header.dtype.hasobject:
                raise ValueError("it holds objects, which are not read")
            if any(side < 0 for side in header.shape) or header.offset + header.bytes != member.file_size:
                raise ValueError("its size is not what it says: it is cut off or damaged")
            yield stream, header


def _read_header(stream: BinaryIO) -> Header:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the .npy format")
    shape, fortran_order, dtype = read(stream)
    return Header(shape, dtype, fortran_order, stream.tell())


@contextlib.contextmanager
def _reading(path: Path, name: str = "") -> Iterator[None]:
    what = f"{name} of {path}" if name else str(path)
    try:
        yield
    except InputError:
        raise
    except KeyError:
        raise InputError(f"{path} holds no array {name}") from None
    except Exception as error:  # damaged archives and headers make zipfile and NumPy raise anything
        raise InputError(f"cannot read {what}: {' '.join(str(error).split())}") from None
