"""The packed layout: all records of a set in about a hundred files, made to be memory-mapped.

manifest.json     contents, counts, skipped images, and the files below with their SHA-256
shard-00000.npy   [n, V, C, H, W], record 0 onward; 12,800 records a full shard
labels.npy        [records] int64, -1 where an image could not be read: its record is zeros
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError
from .progress import progress
from .records import (
    Contents,
    ImageContents,
    RecordReader,
    RecordWriter,
    claim_manifest,
    file_sha256,
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

# The label of a number without a record.
ABSENT = -1


# The bits of a float16 shifted to where a float32 has its sign, exponent and fraction; the sign's are extended.
_HALF_SHIFT, _HALF_MASK = 13, np.int32(-0x70002000)
# The exponent's bias is 127 in float32 and 15 in float16.
_HALF_SCALE = np.float32(2.0**112)
_HALF_LIMIT = np.float32(2.0**16)


def as_float32(values: np.ndarray) -> np.ndarray:
    """A float16 or float32 array as float32, exactly; five times as fast as NumPy's own conversion of float16."""
    if values.dtype != np.float16:
        return values.astype(np.float32, copy=False)
    bits = values.view(np.int16).astype(np.int32)
    bits <<= _HALF_SHIFT
    bits &= _HALF_MASK
    converted = bits.view(np.float32)
    converted *= _HALF_SCALE
    # Infinity and NaN have become numbers beyond the largest float16.
    if np.max(converted, initial=0) >= _HALF_LIMIT or np.min(converted, initial=0) <= -_HALF_LIMIT:
        return values.astype(np.float32)
    return converted


def is_packed(folder: Path) -> bool:
    """Whether a folder is in the packed layout."""
    return (folder / MANIFEST).is_file()


@dataclass(frozen=True)
class _Shard:
    path: Path
    first: int
    records: int
    sha256: str = ""


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
                files.append({"file": shard.path.name, "records": shard.records, "sha256": file_sha256(shard.path)})
                bar.update()
        found = {
            f"{self.contents.unit}s": self.contents.records - len(self.absent()),
            "skipped": skipped,
            "shards": files,
            "labels": {"file": LABELS, "sha256": file_sha256(self.labels)},
        }
        write_manifest(self.folder / MANIFEST, LAYOUT | self.contents.to_dict() | found)


class PackedReader(RecordReader):
    """The records of a packed folder, memory-mapped.

    A process maps a shard when it first reads from it and keeps the map, so that it has one open file a shard at most
    (101 for ImageNet); the pages read are the system's cache, shared by all processes.

    Args:
        folder: in the packed layout.
        kind: of what the records are to be the features.

    Attributes:
        labels: int64 [records]; `ABSENT` where there is none.

    Raises:
        InputError: the manifest or a file is damaged; a file has not the size that the manifest says; or the records
            are of another kind.
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
        self._firsts = [shard.first for shard in self._shards]
        self._maps: dict[int, np.ndarray] = {}
        for shard in self._shards:
            self._map(shard.path, self._shape(shard), self.contents.dtype)
        self._labels_path, self._labels_sha256 = self._listed_file(manifest.get("labels"))
        self.labels = np.array(self._map(self._labels_path, (self.contents.records,), "int64"))

    def read(self, numbers: Sequence[int], views: Sequence[int]) -> np.ndarray:
        """One view of each of these records, float32 [B, C, H, W].

        Raises:
            InputError: one holds values that are not finite.
        """
        stored = np.empty((len(numbers), *self.contents.record_shape[1:]), self.contents.dtype)
        for target, number, view in zip(stored, numbers, views, strict=True):
            target[...] = self._record(number)[view]
        values = as_float32(stored)
        if not np.isfinite(values).all():
            finite = np.isfinite(values).all(axis=(1, 2, 3))
            raise self._not_finite(numbers[int(np.argmin(finite))])
        return values

    def _record(self, number: int) -> np.ndarray:
        k = bisect.bisect_right(self._firsts, number) - 1
        shard = self._shards[k]
        if k not in self._maps:
            # A plain array of the same memory: taking a record from a memmap takes several times as long.
            self._maps[k] = np.asarray(self._map(shard.path, self._shape(shard), self.contents.dtype))
        return self._maps[k][number - shard.first]

    def _not_finite(self, number: int) -> InputError:
        shard = self._shards[bisect.bisect_right(self._firsts, number) - 1]
        return InputError(
            f"record {number - shard.first} of {shard.path} holds values that are not finite; extract it again"
        )

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, int]]:
        self._verify(self._labels_path, self._labels_sha256)
        for shard in self._shards:
            self._verify(shard.path, shard.sha256)
            for number in range(shard.first, shard.first + shard.records):
                if self.labels[number] != ABSENT:
                    record = np.array(self._record(number))
                    if not np.isfinite(record).all():
                        raise self._not_finite(number)
                    yield number, record, int(self.labels[number])

    def _shape(self, shard: _Shard) -> tuple[int, ...]:
        return shard.records, *self.contents.record_shape

    def _listed_shards(self, manifest: dict[str, Any]) -> list[_Shard]:
        shards, first = [], 0
        entries = manifest.get("shards")
        for entry in entries if isinstance(entries, list) else []:
            path, sha256 = self._listed_file(entry)
            if not is_count(entry.get("records")):
                raise InputError(f"{self.manifest_path} does not say how many records {path.name} holds; it is damaged")
            shards.append(_Shard(path, first, entry["records"], sha256))
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

    def _map(self, path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            size = path.stat().st_size
        except FileNotFoundError:
            raise InputError(f"{path} is missing, which {self.manifest_path} lists") from None
        except Exception as error:  # a damaged header can make NumPy raise anything
            reason = " ".join(str(error).split())
            raise InputError(f"cannot read {path} ({reason}); it is damaged or cut off") from None
        found = (getattr(array, "shape", None), str(getattr(array, "dtype", None)))
        if found != (shape, dtype) or size != array.offset + array.nbytes or not array.flags.c_contiguous:
            raise InputError(
                f"{path} holds {found[1]} {found[0]} in {size} bytes; {self.manifest_path} says {dtype} {shape}"
            )
        return array

    def _verify(self, path: Path, sha256: str) -> None:
        if file_sha256(path) != sha256:
            raise InputError(f"{path} is not the file whose checksum {self.manifest_path} has; it is damaged")
