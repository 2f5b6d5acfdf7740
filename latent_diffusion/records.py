"""Records of features: what they are, and what every layout that keeps them on disk can do.

A record is `[V, C, H, W]`. Of an image, V is 1, or 2 where the mirrored image comes second; its label is a class or
another number that tells what it is. Of a text, it is `[1, 1, L, D]`; its label is the number of its image. Records are
numbered as what they come from; an image that cannot be read may leave its number unused.
"""

import dataclasses
import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .errors import InputError
from .files import replace_file, write_json
from .reading import parse_json, read_bytes

LATENTS, MOMENTS, CONTEXTS = "latents", "moments", "contexts"

# Those of VAEs are between 0.1 and 10; beyond these a float32 latent could vanish or become infinite.
_MIN_SCALE, _MAX_SCALE = 1e-6, 1e6

# Of a manifest, which lists the names of all images that were skipped.
_MAX_MANIFEST = 1 << 28


def is_count(value: object) -> bool:
    """Whether a value of a JSON file is an integer of at least 1."""
    return type(value) is int and value >= 1


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


@dataclass(frozen=True)
class Contents:
    """What a set of records is; part of its manifest. A subclass says what they are the features of.

    Attributes:
        unit: what a record is the features of: "image" or "caption".
        content: what the numbers are.
        record_shape: (V, C, H, W).
        dtype: "float16" or "float32".
        records: how many numbers there are, those without a record included.
    """

    content: str
    record_shape: tuple[int, int, int, int]
    dtype: str
    records: int

    unit: ClassVar[str]
    # What a manifest may hold under the name of an attribute.
    VALID: ClassVar[dict[str, Callable[[Any], bool]]] = {
        "record_shape": lambda value: isinstance(value, list) and len(value) == 4 and all(map(is_count, value)),
        "dtype": lambda value: value in ("float16", "float32"),
        "records": is_count,
    }

    @property
    def views(self) -> int:
        """V: 2 with mirrored images, else 1."""
        return self.record_shape[0]

    @property
    def record_bytes(self) -> int:
        """Size of a record."""
        return math.prod(self.record_shape) * np.dtype(self.dtype).itemsize

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_manifest(cls, values: dict[str, Any], path: Path) -> "Contents":
        """Takes the values from the manifest that was read from `path`.

        Raises:
            InputError: a value is missing or cannot be.
        """
        for name, is_valid in cls.VALID.items():
            if not is_valid(values.get(name)):
                raise InputError(f"{path} has {values.get(name)!r} for {name!r}, which cannot be; it is damaged")
        known = {field.name: values.get(field.name) for field in dataclasses.fields(cls)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


@dataclass(frozen=True)
class ImageContents(Contents):
    """What a set of features of images is.

    Attributes:
        content: "latents" (samples of the posterior, scaled: C channels) or "moments" (means and log variances as the
            VAE gives them, unscaled: 2 C channels).
        record_shape: (V, C or 2 C, H, W), V = 2 with mirrored images.
        resolution: side of the images in pixels.
        scaling_factor: of the VAE, what its latents are multiplied by; moments are not.
        vae: name or path of the VAE; None where unknown, as the next three.
        crop: how images became squares.
        seed: of the posterior samples; None for moments too.
        classes: class names by label; None where labels are no classes too.
        image_list_sha256: `image_list_sha256` of the images, by number; None where unknown.
    """

    resolution: int
    scaling_factor: float
    vae: str | None = None
    crop: str | None = None
    seed: int | None = None
    classes: tuple[str, ...] | None = None
    image_list_sha256: str | None = None

    unit = "image"
    VALID = Contents.VALID | {
        "content": lambda value: value in (LATENTS, MOMENTS),
        "record_shape": lambda value: Contents.VALID["record_shape"](value) and value[0] <= 2,
        "resolution": is_count,
        "scaling_factor": lambda value: type(value) in (int, float) and _MIN_SCALE <= value <= _MAX_SCALE,
        "vae": _is_text,
        "crop": _is_text,
        "seed": lambda value: value is None or type(value) is int,
        "classes": lambda value: (
            value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))
        ),
        "image_list_sha256": _is_text,
    }

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        channels, height, width = self.record_shape[1:]
        return channels // 2 if self.content == MOMENTS else channels, height, width

    @classmethod
    def from_manifest(cls, values: dict[str, Any], path: Path) -> "ImageContents":
        contents = super().from_manifest(values, path)
        if contents.content == MOMENTS and contents.record_shape[1] % 2:
            raise InputError(
                f"{path} has record_shape {list(contents.record_shape)}: moments have an even number of channels"
            )
        return contents


@dataclass(frozen=True)
class TextContents(Contents):
    """What a set of features of texts is.

    Attributes:
        content: "contexts", outputs of a text encoder.
        record_shape: (1, 1, L, D): tokens with the padding, and width of the text encoder.
        text_encoder: name or path of the text encoder.
        tokenizer: name or path of its tokenizer.
        text_list_sha256: a checksum of the texts, by number.
    """

    text_encoder: str
    tokenizer: str
    text_list_sha256: str

    unit = "caption"
    VALID = Contents.VALID | {
        "content": lambda value: value == CONTEXTS,
        "record_shape": lambda value: Contents.VALID["record_shape"](value) and value[:2] == [1, 1],
        **dict.fromkeys(("text_encoder", "tokenizer", "text_list_sha256"), lambda value: isinstance(value, str)),
    }

    @property
    def context_shape(self) -> tuple[int, int]:
        """(L, D) of an encoded text."""
        return self.record_shape[2:]


class RecordWriter(ABC):
    """Writes records in any order, from any number of processes; those that are complete survive a crash."""

    def __init__(self, contents: Contents):
        self.contents = contents

    @abstractmethod
    def claim(self) -> None:
        """Prepares the folder; one process calls it before any writes.

        Raises:
            InputError: the folder holds records with other contents.
        """

    @abstractmethod
    def absent(self) -> list[int]:
        """Numbers of the records that are not there yet."""

    @abstractmethod
    def write(self, numbers: Sequence[int], records: np.ndarray, labels: Sequence[int]) -> None:
        """Writes records `[B, V, C, H, W]` under their numbers, with their labels; their type becomes `dtype`."""

    @abstractmethod
    def finish(self, skipped: list[str]) -> None:
        """Completes the manifest: counts, the images without a record, checksums. One process calls it at the end."""


class RecordReader(ABC):
    """Reads all records of a folder one after the other.

    Attributes:
        contents: what they are.
        skipped: the images without a record, as the manifest lists them.
    """

    contents: Contents
    skipped: list[str]

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[int, np.ndarray, int]]:
        """Yields number, record `[V, C, H, W]` and label by rising number.

        Raises:
            InputError: a file is damaged, or is not what the manifest's checksum says.
        """


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a manifest; `InputError` if it is no JSON object."""
    try:
        values = parse_json(read_bytes(path, _MAX_MANIFEST))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged; remove it and the features it describes, and extract them anew")
    return values


def skipped_images(manifest: dict[str, Any], path: Path) -> list[str]:
    """The images without a record that a manifest lists; `InputError` if it is not complete."""
    skipped = manifest.get("skipped")
    if not isinstance(skipped, list) or not all(isinstance(image, str) for image in skipped):
        raise InputError(f"{path} lists no skipped images: the extraction is not complete; run the same command again")
    return skipped


def check_complete(path: Path, name: str, found: int) -> None:
    """Compares the number of files beside a manifest with what it says, where there is one; some may have been added.

    Args:
        path: of the manifest.
        name: of what is counted: "images" or "captions".
        found: how many there are.

    Raises:
        InputError: the manifest is damaged or not complete, or says that there are more.
    """
    if not os.path.lexists(path):
        return
    values = read_manifest(path)
    skipped_images(values, path)
    if not is_count(values.get(name)):
        raise InputError(f"{path} has {values.get(name)!r} for {name!r}, which cannot be; it is damaged")
    if found < values[name]:
        raise InputError(f"{path} says there are {values[name]} {name}, but there are {found}; restore the others")


def write_manifest(path: Path, values: dict[str, Any]) -> None:
    """Writes a manifest."""
    replace_file(path, lambda temporary: write_json(temporary, values))


def claim_manifest(path: Path, values: dict[str, Any]) -> None:
    """Writes a manifest and its folder, or checks that an earlier run with the same values wrote it.

    Raises:
        InputError: it is there with other values.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_manifest(path, values)
        return
    earlier = read_manifest(path)
    for name, value in values.items():
        if earlier.get(name) != value:
            raise InputError(
                f"{path} says the features there were made with {name} {earlier.get(name)!r}, not {value!r}; "
                "choose another --features-path or remove them"
            )


def image_list_sha256(paths: Iterable[Path]) -> str:
    """SHA-256, in hexadecimal, of the paths of images below their folder, in their order, each ended by a zero byte."""
    return hashlib.sha256(b"".join(os.fsencode(path) + b"\0" for path in paths)).hexdigest()
