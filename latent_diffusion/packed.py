"""The packed layout: all records of a set in about a hundred files, read by position.

manifest.json     contents, counts, skipped images, and the files below with their SHA-256
shard-00000.npy   [n, V, C, H, W], record 0 onward; 12,800 records a full shard
labels.npy        [records] int64, -1 where an image could not be read: its record is zeros
"""

import contextlib
import hashlib
import itertools
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError
from .files import file_sha256
from .native.records import record_reader
from .npy import MAX_HEADER, ArrayHeader, parse_array, parse_header, read_header
from .progress import progress
from .reading import open_regular, read_bytes
from .records import (
    Contents,
    ImageContents,
    RecordReader,
    RecordWriter,
    claim_manifest,
    is_count,
    read_manifest,
    skipped_images,
    write_manifest,
)
from .row_files import allocate, write_rows

MANIFEST, LABELS = "manifest.json", "labels.npy"
LAYOUT = {"layout": "packed", "version": 1}

# 101 files for the 1,281,167 images of ImageNet.
RECORDS_PER_SHARD = 12_800

# Bytes at the start of a shard with a checksum of their own, compared when it is opened: the whole shard's would take
# minutes. Shards that changed places, or are of other features, differ there.
HEAD_BYTES = 1 << 16

# Bytes that are fetched together, as Linux does around a page of a file that is mapped into memory.
FETCHED_BYTES = 1 << 17

# In place of a file's descriptor.
NOT_OPEN = -1

# The label of a number without a record.
ABSENT = -1


# The bits of a float16 shifted to where a float32 has its sign, exponent and fraction; the sign's are extended.
_HALF_SHIFT, _HALF_MASK = 13, np.int32(-0x70002000)
# The exponent's bias is 127 in float32 and 15 in float16.
_HALF_SCALE = np.float32(2.0**112)
# The exponent of infinities and NaN: all of its bits are set.
_HALF_INFINITE = np.uint16(0x7C00)


def as_float32(values: np.ndarray) -> np.ndarray:
    """A finite float16 or float32 array as float32, exactly; much faster than NumPy's own conversion of float16."""
    if values.dtype != np.float16:
        return values.astype(np.float32, copy=False)
    bits = values.view(np.int16).astype(np.int32)
    bits <<= _HALF_SHIFT
    bits &= _HALF_MASK
    converted = bits.view(np.float32)
    converted *= _HALF_SCALE
    return converted


def is_finite(values: np.ndarray) -> bool:
    """Whether all values of a float16 or float32 array are finite; of float16 much faster than NumPy says it."""
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    return bool(np.max(values.view(np.uint16) & _HALF_INFINITE, initial=0) < _HALF_INFINITE)


def is_packed(folder: Path) -> bool:
    """Whether a folder is in the packed layout, or was: whatever has the manifest's name is to be read as one."""
    return os.path.lexists(folder / MANIFEST)


@dataclass(frozen=True)
class _Shard:
    path: Path
    first: int
    records: int
    sha256: str = ""
    head_sha256: str | None = None  # of a manifest that an earlier version wrote


class PackedWriter(RecordWriter):
    """Writes the packed layout into a folder; a record's label is written last and marks it as done.

    Args:
        folder: need not exist. Until `finish` its manifest lists no files, and `PackedReader` refuses it.
        contents: of the records.
    """

    def __init__(self, folder: Path, contents: Contents):
        super().__init__(contents)
        self.folder, self.labels = folder, folder / LABELS
        starts = range(0, contents.records, RECORDS_PER_SHARD)
        self.shards = [
            _Shard(folder / f"shard-{k:05}.npy", first, min(RECORDS_PER_SHARD, contents.records - first))
            for k, first in enumerate(starts)
        ]

    def claim(self) -> None:
        claim_manifest(self.folder / MANIFEST, LAYOUT | self.contents.to_dict())
        if self.labels.exists():
            return
        for shard in self.shards:
            allocate(shard.path, (shard.records, *self.contents.record_shape), self.contents.dtype)
        # Under its name the file of labels says that all shards were allocated.
        temporary = self.labels.with_suffix(".tmp")
        allocate(temporary, (self.contents.records,), "int64", ABSENT)
        temporary.rename(self.labels)

    def absent(self) -> list[int]:
        return np.flatnonzero(np.load(self.labels) == ABSENT).tolist()

    def write(self, numbers: Sequence[int], records: np.ndarray, labels: Sequence[int]) -> None:
        by_shard = itertools.groupby(zip(numbers, records, strict=True), lambda pair: pair[0] // RECORDS_PER_SHARD)
        for k, pairs in by_shard:
            first = self.shards[k].first
            write_rows(self.shards[k].path, [(number - first, record) for number, record in pairs], durable=True)
        write_rows(self.labels, zip(numbers, labels, strict=True), durable=False)

    def finish(self, skipped: list[str]) -> None:
        files = []
        with progress(total=len(self.shards), desc="checksums", unit="shard") as bar:
            for shard in self.shards:
                with open_regular(shard.path) as file:
                    checksums = {"sha256": file_sha256(shard.path), "head_sha256": _head_sha256(file)}
                files.append({"file": shard.path.name, "records": shard.records} | checksums)
                bar.update()
        found = {
            f"{self.contents.unit}s": self.contents.records - len(self.absent()),
            "skipped": skipped,
            "shards": files,
            "labels": {"file": LABELS, "sha256": file_sha256(self.labels)},
        }
        write_manifest(self.folder / MANIFEST, LAYOUT | self.contents.to_dict() | found)


class PackedReader(RecordReader):
    """The records of a packed folder.

    A process opens a shard when it first reads from it and keeps it open: 101 files for ImageNet. They are not mapped
    into memory, since a file that is cut off under a map ends the process without a word.

    Args:
        folder: in the packed layout.
        kind: of what the records are to be the features.

    Attributes:
        labels: int64 [records]; `ABSENT` where there is none.

    Raises:
        InputError: the manifest or a file is damaged; a file has not the size that the manifest says; the labels, or a
            shard's start, are others than those whose checksums it has; or the records are of another kind.
    """

    def __init__(self, folder: Path, kind: type[Contents] = ImageContents):
        self.folder, self.manifest_path = folder, folder / MANIFEST
        manifest = read_manifest(self.manifest_path)
        for name, expected in LAYOUT.items():
            if manifest.get(name) != expected:
                raise InputError(
                    f"{self.manifest_path} has {name} {manifest.get(name)!r}, not {expected!r}: it is not of packed "
                    "features that this version reads"
                )
        self.contents = kind.from_manifest(manifest, self.manifest_path)
        self.skipped = skipped_images(manifest, self.manifest_path)
        self._shards = self._listed_shards(manifest)
        self._ends = np.array([shard.first + shard.records for shard in self._shards])
        self._record_bytes = self.contents.record_bytes
        self._view_bytes = self._record_bytes // self.contents.views
        self._half = self.contents.dtype == "float16"
        # Descriptor of each shard, and at which of its bytes record 0 of the set would begin.
        self._descriptors = np.full(len(self._shards), NOT_OPEN, np.int32)
        self._starts = np.zeros(len(self._shards), np.int64)
        self._read_records = record_reader()
        for shard in self._shards:
            self._check_shard(shard)
        # Which blocks were fetched, shard after shard: those of a shard that is not open were not.
        blocks = self.contents.records * self._record_bytes // FETCHED_BYTES + len(self._shards)
        self._fetched = np.zeros(blocks, bool)
        self.labels = self._read_labels(*self._listed_file(manifest.get("labels")))

    def read(self, numbers: Sequence[int], views: Sequence[int]) -> np.ndarray:
        """One view of each of these records, float32 [B, C, H, W].

        Raises:
            InputError: one cannot be read, or holds values that are not finite.
        """
        shards, positions = self._places(numbers, views)
        values = np.empty((len(shards), *self.contents.record_shape[1:]), np.float32)
        if self._read_records and self._read_records(values, self._descriptors[shards], positions, self._half):
            return values
        # This also finds what is wrong.
        return self._read_in_python(numbers, shards, positions)

    def _read_in_python(self, numbers: Sequence[int], shards: np.ndarray, positions: np.ndarray) -> np.ndarray:
        places = zip(shards.tolist(), positions.tolist(), strict=True)
        data = b"".join([self._read_bytes(k, position, self._view_bytes) for k, position in places])
        stored = np.frombuffer(data, self.contents.dtype)
        stored = stored.reshape(len(numbers), *self.contents.record_shape[1:])
        if not is_finite(stored):
            raise self._not_finite(next(n for n, view in zip(numbers, stored, strict=True) if not is_finite(view)))
        return as_float32(stored)

    def _places(self, numbers: Sequence[int], views: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The shard, now open, of each of these records, and at which of its bytes a view of the record begins.

        The first time, the system begins to fetch these bytes with what is around them, so that those of a batch come
        at once and their neighbors are there when they are needed.
        """
        numbers, views = np.array((numbers, views), np.int64)
        shards = self._ends.searchsorted(numbers, "right")
        offsets = numbers * self._record_bytes + views * self._view_bytes
        # Two shards never share a block, hence their numbers in it.
        blocks = offsets // FETCHED_BYTES + shards
        new = ~self._fetched[blocks]
        for shard, block in set(zip(shards[new].tolist(), blocks[new].tolist(), strict=True)):
            self._fetch(shard, block)
        return shards, self._starts[shards] + offsets

    def _fetch(self, k: int, block: int) -> None:
        """Lets the system read a block in the background, as far as this shard has it."""
        if self._descriptors[k] == NOT_OPEN:
            self._keep_open(k)
        self._fetched[block] = True
        if hasattr(os, "posix_fadvise"):  # not on a Mac
            start = max(int(self._starts[k]) + (block - k) * FETCHED_BYTES, 0)
            os.posix_fadvise(self._descriptors[k], start, FETCHED_BYTES, os.POSIX_FADV_WILLNEED)

    def _keep_open(self, k: int) -> None:
        shard = self._shards[k]
        file, offset = self._opened(shard)
        weakref.finalize(self, file.close)
        self._descriptors[k], self._starts[k] = file.fileno(), offset - shard.first * self._record_bytes

    def _read_bytes(self, k: int, position: int, size: int) -> bytes:
        path = self._shards[k].path
        try:
            data = _pread(self._descriptors[k], size, position)
        except OSError as error:
            raise InputError(f"cannot read {path} ({error.strerror})") from None
        if len(data) != size:
            raise InputError(f"{path} was cut off after it had been opened; restore it, or extract it again")
        return data

    def _not_finite(self, number: int) -> InputError:
        shard = self._shards[self._ends.searchsorted(number, "right")]
        return InputError(
            f"record {number - shard.first} of {shard.path} holds values that are not finite; extract it again"
        )

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, int]]:
        for shard in self._shards:
            self._check_shard(shard)
            with self._naming_damage(shard.path):
                found = file_sha256(shard.path)
            self._compare(shard.path, found, shard.sha256)
            for number in range(shard.first, shard.first + shard.records):
                if self.labels[number] != ABSENT:
                    [k], [position] = self._places([number], [0])
                    data = self._read_bytes(k, position, self._record_bytes)
                    record = np.frombuffer(data, self.contents.dtype).reshape(self.contents.record_shape)
                    if not is_finite(record):
                        raise self._not_finite(number)
                    yield number, record, int(self.labels[number])

    def _listed_shards(self, manifest: dict[str, Any]) -> list[_Shard]:
        shards, first = [], 0
        entries = manifest.get("shards")
        for entry in entries if isinstance(entries, list) else []:
            path, sha256 = self._listed_file(entry)
            if not is_count(entry.get("records")):
                raise InputError(f"{self.manifest_path} does not say how many records {path.name} holds; it is damaged")
            head_sha256 = entry.get("head_sha256")
            shards.append(_Shard(path, first, entry["records"], sha256, head_sha256))
            first += entry["records"]
        if first != self.contents.records:
            raise InputError(
                f"{self.manifest_path} lists shards of {first} records, not {self.contents.records}; it is damaged"
            )
        return shards

    def _listed_file(self, entry: object) -> tuple[Path, str]:
        """Path and checksum of a file that the manifest lists."""
        name, sha256 = (entry.get("file"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(sha256, str):
            raise InputError(f"{self.manifest_path} lists a file without name or checksum; it is damaged")
        # A path could lead anywhere on the disk.
        if Path(name).name != name or not name.endswith(".npy"):
            raise InputError(f"{self.manifest_path} lists the file {name!r}, which is no plain name of an .npy file")
        return self.folder / name, sha256

    def _check_shard(self, shard: _Shard) -> None:
        file, _ = self._opened(shard)
        with file:
            if shard.head_sha256 is not None:
                self._compare(shard.path, _head_sha256(file), shard.head_sha256)

    def _opened(self, shard: _Shard) -> tuple[FileIO, int]:
        """A shard's file, and at which byte its first record begins."""
        with contextlib.ExitStack() as on_error:
            with self._naming_damage(shard.path):
                file = on_error.enter_context(open_regular(shard.path))
                header = read_header(file)
            self._check(shard.path, header, (shard.records, *self.contents.record_shape), self.contents.dtype)
            on_error.pop_all()
        return file, header.offset

    def _read_labels(self, path: Path, sha256: str) -> np.ndarray:
        with self._naming_damage(path):
            content = read_bytes(path, limit=MAX_HEADER + self.contents.records * np.dtype(np.int64).itemsize)
            header, labels = parse_header(content), parse_array(content)
        self._check(path, header, (self.contents.records,), "int64")
        self._compare(path, hashlib.sha256(content).hexdigest(), sha256)
        return labels

    @contextlib.contextmanager
    def _naming_damage(self, path: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise InputError(f"{path} is missing, which {self.manifest_path} lists") from None
        except OSError as error:
            raise InputError(f"cannot read {path} ({error.strerror})") from None
        except ValueError as error:
            raise InputError(f"cannot read {path} ({error}); it is damaged or cut off") from None

    def _check(self, path: Path, header: ArrayHeader, shape: tuple[int, ...], dtype: str) -> None:
        if (header.shape, header.dtype.str, header.fortran_order) != (shape, np.dtype(dtype).str, False):
            order = " in Fortran's order" if header.fortran_order else ""
            raise InputError(
                f"{path} holds {header.dtype} {header.shape}{order}; {self.manifest_path} says {dtype} {shape}"
            )

    def _compare(self, path: Path, found: str, sha256: str) -> None:
        if found != sha256:
            raise InputError(f"{path} is not the file whose checksum {self.manifest_path} has; it is damaged")


def count_texts(images: PackedReader, texts: PackedReader) -> np.ndarray:
    """How many texts each image has, whose number is their label; in the order of the images: int64 [N].

    Raises:
        InputError: an image has no record or no text, or the texts are in another order.
    """
    owners, records = texts.labels, len(images.labels)
    numbers, counts = np.unique(owners, return_counts=True)
    if ABSENT in images.labels or not np.array_equal(numbers, np.arange(records)) or (np.diff(owners) < 0).any():
        raise InputError(
            f"{texts.folder / LABELS} does not give each image of {images.folder} its captions, in order; extract "
            "them again"
        )
    return counts


def _pread(descriptor: int, size: int, position: int) -> bytes:
    """Bytes of a file, fewer only where it ends: a single call may give fewer elsewhere."""
    data = b""
    while len(data) < size and (part := os.pread(descriptor, size - len(data), position + len(data))):
        data += part
    return data


def _head_sha256(file: FileIO) -> str:
    return hashlib.sha256(_pread(file.fileno(), HEAD_BYTES, 0)).hexdigest()
