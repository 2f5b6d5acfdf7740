"""`.npy` files of a known size that several processes fill, each with rows of its own."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def allocate(path: Path, shape: tuple[int, ...], dtype: str, value: int = 0) -> None:
    """Makes an array file of equal values; zeros take no space until they are written over."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if value:
        array[:] = value
        array.flush()


def write_rows(path: Path, rows: Iterable[tuple[int, object]], durable: bool) -> None:
    """Writes rows over those of an array file: byte ranges, which other processes' writes do not touch.

    Args:
        path: made by `allocate`.
        rows: numbers and values of rows.
        durable: return when they are on the disk.
    """
    target = np.load(path, mmap_mode="r")
    with path.open("r+b") as file:
        for row, values in rows:
            data = np.asarray(values, target.dtype).tobytes()
            file.seek(target.offset + row * len(data))
            file.write(data)
        file.flush()
        if durable:
            os.fdatasync(file.fileno())
