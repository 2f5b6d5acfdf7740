"""Captioned images, from a folder of images and the captions file of COCO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.errors import InputError
from latent_diffusion.files import read_lines
from latent_diffusion.reading import parse_json, read_bytes

# Bytes of a captions file; COCO's have up to 70 MB.
MAX_CAPTIONS = 1 << 30


@dataclass
class CaptionedImage:
    """An image of a captions file.

    Attributes:
        id: its number there.
        name: its path below the folder of images.
        captions: in the order of the file.
    """

    id: int
    name: Path
    captions: list[str] = field(default_factory=list)


def read_captions(path: Path) -> list[CaptionedImage]:
    """The images of a captions file that have a caption, by rising id: the order in which U-ViT numbers them.

    Args:
        path: JSON as COCO's `captions_train2014.json`: "images" of "id" and "file_name", "annotations" of "image_id"
            and "caption".

    Raises:
        InputError: the file cannot be read, is no such JSON, or names an image outside of the folder of images.
    """
    try:
        content = parse_json(read_bytes(path, MAX_CAPTIONS))
    except OSError as error:
        raise InputError(f"cannot read the captions file {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"the captions file {path} is not JSON: {error}") from None
    images: dict[int, CaptionedImage] = {}
    for entry in _entries(content, "images", {"id": _is_number, "file_name": _is_text}, path):
        if entry["id"] in images:
            raise InputError(f"{path} has two images of the id {entry['id']}")
        images[entry["id"]] = CaptionedImage(entry["id"], _below(entry["file_name"], path))
    for entry in _entries(content, "annotations", {"image_id": _is_number, "caption": _is_unicode}, path):
        if entry["image_id"] not in images:
            raise InputError(f"{path} has a caption of the image {entry['image_id']}, but no such image")
        images[entry["image_id"]].captions.append(entry["caption"])
    captioned = [images[number] for number in sorted(images) if images[number].captions]
    if not captioned:
        raise InputError(f"{path} has no image with a caption")
    return captioned


def _entries(content: Any, name: str, keys: dict[str, Callable[[Any], bool]], path: Path) -> list[dict[str, Any]]:
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{path} holds no list {name!r}: it is no captions file of COCO")
    for number, entry in enumerate(entries):
        for key, is_valid in keys.items():
            if not isinstance(entry, dict) or not is_valid(entry.get(key)):
                raise InputError(f"{path} has no valid {key!r} in entry {number} of {name!r}")
    return entries


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_unicode(value: object) -> bool:
    # JSON can hold halves of a character, which nothing can be written of.
    return _is_text(value) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _below(name: str, path: Path) -> Path:
    # The file could lead anywhere on the disk.
    relative = Path(name)
    writable = name.isprintable()  # no surrogates or control characters
    if relative.is_absolute() or ".." in relative.parts or not writable or not relative.parts:
        raise InputError(f"{path} names the image {name!r}, which is no path below the folder of images")
    return relative


def choose_captions(images: Sequence[CaptionedImage], seed: int) -> list[str]:
    """One caption of each image, both in random order: the first 30,000 of COCO's val are what papers evaluate on.

    Args:
        images: from `read_captions`.
        seed: what is chosen is a function of it and of the images.

    Returns:
        The captions, each in one line.
    """
    rng = np.random.default_rng(seed)
    chosen = [images[number] for number in rng.permutation(len(images))]
    return [_one_line(image.captions[rng.integers(len(image.captions))]) for image in chosen]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def read_prompts_file(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        InputError: it cannot be read, is not UTF-8, or has none.
    """
    prompts = [line for line in read_lines(path) if line]
    if not prompts:
        raise InputError(f"the file of prompts {path} holds no prompt; write one a line")
    return prompts
