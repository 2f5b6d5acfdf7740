"""The flags that the programs of loading share, and how they are timed. Standard library only."""

import argparse
import os
import time
from pathlib import Path

from timing import print_figures, seconds

BATCH_SIZE = 16


def parse(description, *choices):
    """The flags common to all; `choices` are what the program can do."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["open", *choices], help="what is timed")
    add("folder", type=Path, help="of features")
    add("image_size", type=int, help="side of the images in pixels")
    add("--workers", type=int, default=0, help="processes that read")
    return parser.parse_args()


def measure_opening(opening):
    """Prints the seconds of opening a folder the first time and, in "again", once more."""
    first, again = (seconds(opening) for _ in range(2))
    print_figures(seconds=[first], again=again)


def measure_reading(folder, epochs, batches):
    """Prints seconds per sample of two epochs.

    The first one ("cold") begins when the files were just dropped from the system's cache, as far as it lets go of
    them; the second one is "seconds". The first batch of each is not timed: workers start.

    Args:
        folder: of the files.
        epochs: yields two iterables of batches.
        batches: of an epoch.
    """
    drop_from_cache(folder)
    cold, warm = (_seconds_per_sample(iter(epoch), batches) for epoch in epochs)
    print_figures(seconds=[warm], cold=cold)


def drop_from_cache(folder):
    os.sync()  # what is not on the disk yet stays
    for path in folder.rglob("*.npy"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds_per_sample(epoch, batches):
    next(epoch)
    start = time.perf_counter()
    for _ in range(batches - 1):
        next(epoch)
    return (time.perf_counter() - start) / ((batches - 1) * BATCH_SIZE)
