"""Reading records of files with a kernel. Nothing of Paddle: forked processes call it."""

import ctypes
from collections.abc import Callable

import numpy as np

from .library import load


def record_reader() -> Callable[[np.ndarray, np.ndarray, np.ndarray, bool], bool] | None:
    """A function that reads records of float16 or float32 numbers as float32; None without the kernels.

    To be called before the process that reads is forked: the loader of libraries has a lock.

    The function takes where the records are written, float32 [n, ...]; descriptors of their files, int32 [n]; at which
    bytes of these they begin, int64 [n]; and whether they are float16. It returns whether all could be read and are
    finite, and starts no thread.

    Raises, when it reads:
        ValueError: an array is another than these.
    """
    kernels = load()
    if kernels is None:
        return None
    kernel = kernels.read_records
    kernel.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3

    def read(out: np.ndarray, files: np.ndarray, positions: np.ndarray, half: bool) -> bool:
        for array, dtype in ((out, np.float32), (files, np.int32), (positions, np.int64)):
            if array.dtype != dtype or len(array) != len(out) or not array.flags.c_contiguous:
                raise ValueError(f"{array.dtype} {array.shape} does not fit {len(out)} records")
        addresses = (array.ctypes.data for array in (out, files, positions))
        return bool(kernel(*addresses, len(out), out.size // max(len(out), 1), half))

    return read
