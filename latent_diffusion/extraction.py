"""Records made of images or texts, by one process or several; after an interruption it continues.

Batches of one size always have the same members, whatever the number of processes and wherever an earlier run stopped.
So the records are the same byte for byte.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import distributed
from .errors import InputError
from .files import preparing_folder, publish_folder
from .images import Crop, read_image
from .packed import ABSENT, MANIFEST, PackedReader, PackedWriter, is_packed
from .progress import progress
from .records import Contents, RecordWriter, claim_manifest

# The layouts, and the type of the records in each unless another is asked for.
LAYOUTS = {"files": "float32", "packed": "float16"}

# Batches whose images are being decoded while one is encoded.
BATCHES_AHEAD = 2


class Source(ABC):
    """What records are made of, by number."""

    @abstractmethod
    def read_ahead(self, batches: list[range]) -> Iterator[tuple[range, Any, np.ndarray]]:
        """Yields each batch with its members, as many as it has numbers, and which of them could be read: bool [B]."""

    @abstractmethod
    def skipped(self, number: int) -> str:
        """The name of a member that has no record; `InputError` if it could be read: then its record was lost."""


@dataclass(frozen=True)
class Work:
    """How records are made.

    Attributes:
        source: what they are made of.
        encode: a function of the members of a batch and their numbers that gives their records `[B, V, C, H, W]`.
        labels: of the records, by number.
        batch_size: members encoded at a time.
        left_out: names of what could not be read and has no number, for the manifest.
    """

    source: Source
    encode: Callable[[Any, range], np.ndarray]
    labels: Sequence[int]
    batch_size: int
    left_out: Sequence[str] = ()


@dataclass(frozen=True)
class Extracted:
    """How an extraction ended: records that are there, those of them made now, and names of what was skipped."""

    records: int
    encoded: int
    skipped: list[str]


def check_at_least_one(**counts: int) -> None:
    """Raises `InputError` for a count, such as `batch_size`, that is less."""
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"the {name.replace('_', ' ')} must be at least 1, not {value}")


def batches(count: int, size: int) -> list[range]:
    """The numbers below `count`, `size` at a time."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass(frozen=True)
class Share:
    """What a process of a run has to make.

    Attributes:
        rank: of the process.
        absent: all numbers that were not there when the run began.
        pending: the batches of this process with any of them.
        note: says in a progress bar that this is a part.
    """

    rank: int
    absent: set[int]
    pending: list[range]
    note: str


def claim_share(
    folder: Path, claim: Callable[[], None], list_absent: Callable[[], list[int]], count: int, batch_size: int
) -> Share:
    """Prepares a folder once and divides what it lacks among the processes of a run; all of them call it together.

    Args:
        folder: that is filled.
        claim: makes the folder, or checks that it can be continued; called by the first process.
        list_absent: numbers below `count` that are not there.
        count: of all.
        batch_size: of batches, which have the same members whatever is absent.

    Raises:
        InputError: the folder cannot be written, or what `claim` raises.
    """
    rank, world_size = distributed.start()
    if rank == 0:
        with preparing_folder(folder):
            claim()
    distributed.barrier()
    absent = set(list_absent())
    distributed.barrier()  # nobody writes before everybody has looked
    own = batches(count, batch_size)[rank::world_size]
    pending = [batch for batch in own if not absent.isdisjoint(batch)]
    return Share(rank, absent, pending, "" if world_size == 1 else f" (share of one process of {world_size})")


def write_packed(folder: Path, contents: Contents, work: Work) -> Extracted | None:
    """As `write_records`, in the packed layout; the records are in `<folder>.partial` until all are there.

    Raises:
        InputError: too, where `folder` holds something else.
    """
    if is_packed(folder):
        rank, _ = distributed.start()
        return _finished(folder, contents) if rank == 0 else None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and holds no packed features; choose another --features-path")
    partial = folder.absolute().with_name(f"{folder.name}.partial")
    extracted = write_records(PackedWriter(partial, contents), work)
    if extracted is not None:
        publish_folder(partial, folder.absolute())
    return extracted


def write_records(writer: RecordWriter, work: Work) -> Extracted | None:
    """Writes the records that are not there yet; the processes of a launched run share the batches.

    Returns:
        The result on rank 0, None on others.

    Raises:
        InputError: a member is unreadable, or the folder cannot be written or holds records with other contents.
    """
    records = writer.contents.records
    share = claim_share(writer.folder, writer.claim, writer.absent, records, work.batch_size)
    with progress(sum(map(len, share.pending)), f"extract{share.note}", writer.contents.unit) as bar:
        for batch, members, readable in work.source.read_ahead(share.pending):
            made = work.encode(members, batch)
            kept = [number for number, found in zip(batch, readable, strict=True) if found]
            writer.write(kept, made[readable], [work.labels[number] for number in kept])
            bar.update(len(batch))

    # After a restart one process may have hours of work left and another none.
    distributed.barrier(patience=math.inf)
    if share.rank > 0:
        return None
    skipped = [work.source.skipped(number) for number in writer.absent()]
    writer.finish([*work.left_out, *skipped])
    return Extracted(records - len(skipped), len(share.absent) - len(skipped), [*work.left_out, *skipped])


def _finished(folder: Path, contents: Contents) -> Extracted:
    claim_manifest(folder / MANIFEST, contents.to_dict())
    reader = PackedReader(folder, type(contents))
    return Extracted(int((reader.labels != ABSENT).sum()), 0, reader.skipped)


def read_in_threads(
    batches: list[range], read: Callable[[int], Any], workers: int
) -> Iterator[tuple[range, list[Any]]]:
    """Yields each batch with what `read` gives for its numbers, which threads read `BATCHES_AHEAD` of its use."""
    with ThreadPoolExecutor(workers) as pool:
        reading = deque()

        def oldest() -> tuple[range, list[Any]]:
            batch, futures = reading.popleft()
            return batch, [future.result() for future in futures]

        for batch in batches:
            reading.append((batch, [pool.submit(read, number) for number in batch]))
            if len(reading) > BATCHES_AHEAD:
                yield oldest()
        while reading:
            yield oldest()


class ImageSource(Source):
    """The images of a list, decoded in threads ahead of their use; unreadable ones stop it or are skipped.

    Args:
        root: their folder.
        names: their paths below it, by number.
        size: side in pixels that they are brought to by `crop`.
        workers: threads.
        skip_unreadable: name an image that cannot be read on stderr and go on.
    """

    def __init__(
        self, root: Path, names: Sequence[Path], size: int, crop: Crop, workers: int, skip_unreadable: bool = False
    ):
        self.root, self.names, self.size, self.crop = root, names, size, crop
        self.workers, self.skip_unreadable = workers, skip_unreadable

    def read_ahead(self, batches: list[range]) -> Iterator[tuple[range, np.ndarray, np.ndarray]]:
        """Yields each batch with its images uint8 [B, H, W, 3], and which of them could be read: bool [B].

        A skipped image is black, so that the batch has its size: results could depend on that in their last digits.
        """
        for batch, found in read_in_threads(batches, self._read, self.workers):
            yield self._batch(batch, found)

    def skipped(self, number: int) -> str:
        if isinstance(self._read(number), np.ndarray):
            path = self.root / self.names[number]
            raise InputError(f"{path} can be read but has no features; run the same command again")
        return str(self.names[number])

    def _read(self, number: int) -> np.ndarray | InputError:
        try:
            return read_image(self.root / self.names[number], self.size, self.crop)
        except InputError as error:
            if self.skip_unreadable:
                return error
            raise

    def _batch(self, batch: range, found: list[np.ndarray | InputError]) -> tuple[range, np.ndarray, np.ndarray]:
        for error in found:
            if isinstance(error, InputError):
                print(f"skipped: {error}", file=sys.stderr, flush=True)
        readable = np.array([isinstance(image, np.ndarray) for image in found])
        black = np.zeros((self.size, self.size, 3), np.uint8)
        images = np.stack([image if isinstance(image, np.ndarray) else black for image in found])
        return batch, images, readable


class CaptionSource(Source):
    """The captions of a list."""

    def __init__(self, captions: list[str]):
        self.captions = captions

    def read_ahead(self, batches: list[range]) -> Iterator[tuple[range, list[str], np.ndarray]]:
        for batch in batches:
            yield batch, self.captions[batch.start : batch.stop], np.ones(len(batch), bool)

    def skipped(self, number: int) -> str:
        raise InputError(f"caption {number} ({self.captions[number]!r}) has no features; run the same command again")
