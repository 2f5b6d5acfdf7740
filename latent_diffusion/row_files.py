"""`.npy` files of a known size that several processes fill, each with rows of its own."""

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .errors import naming_file


def allocate(path: Path, shape: tuple[int, ...], dtype: str, value: int = 0) -> None:
    """Makes an array file of equal values; zeros take no space until they are written over."""
    header = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(header, {"descr": description, "fortran_order": False, "shape": shape})
    row = np.full(shape[1:], value, dtype).tobytes()
    # Not through a memory map: what a full disk does not take of one kills the process.
    with naming_file(path), path.open("wb") as file:
        file.write(header.getvalue())
        if value:
            for _ in range(shape[0]):
                file.write(row)
        else:
            file.truncate(header.tell() + shape[0] * len(row))
        file.flush()
        os.fsync(file.fileno())


def write_rows(path: Path, rows: Iterable[tuple[int, object]], durable: bool) -> None:
    """Writes rows over those of an array file: byte ranges, which other processes' writes do not touch.

    Args:
        path: made by `allocate`.
        rows: numbers and values of rows.
        durable: return when they are on the disk.
    """
    target = np.load(path, mmap_mode="r")
    with naming_file(path), path.open("r+b") as file:
        for row, values in rows:
            data = np.asarray(values, target.dtype).tobytes()
            file.seek(target.offset + row * len(data))
            file.write(data)
        file.flush()
        if durable:
            os.fdatasync(file.fileno())
