"""The layout of U-ViT's COCO features on disk: one file an image, and one for each of its captions.

    <folder>/train/<i>.npy        moments of image i, [8, 32, 32]: means, then log variances; not scaled
    <folder>/train/<i>_<k>.npy    its caption k, encoded, [77, 768]
    <folder>/val/...              the same
    <folder>/empty_context.npy    the empty caption, encoded
    <folder>/run_vis/<j>.npy      prompt j as text and encoded, in a pickled object array (optional)
    <folder>/train_images_manifest.json, train_captions_manifest.json    what extraction knows of them (optional)

i and k count from 0 without gaps; every image has a caption, how many differs. In the packed layout the folders
`train/images` and `train/captions` are in place of the files in `train`.
"""

import itertools
import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latent_diffusion.array_files import ArrayFilesWriter, array_file, write_file
from latent_diffusion.errors import InputError
from latent_diffusion.features import array_names
from latent_diffusion.records import Contents
from latent_diffusion.weights import read_object_array

# No leading zeros: two names would be of one number.
_NAME = re.compile(r"(0|[1-9][0-9]{0,8})(?:_(0|[1-9][0-9]{0,8}))?\.npy")


def image_name(image: int) -> str:
    """File name of the moments of an image."""
    return f"{image}.npy"


def caption_name(image: int, caption: int) -> str:
    """File name of a caption of an image."""
    return f"{image}_{caption}.npy"


def packed_folder(feature_path: Path, split: str, kind: str) -> Path:
    """Folder of packed "images" or "captions"."""
    return feature_path / split / kind


def manifest_path(feature_path: Path, split: str, kind: str) -> Path:
    """Manifest of the files of "images" or "captions"."""
    return feature_path / f"{split}_{kind}_manifest.json"


def empty_context_path(feature_path: Path) -> Path:
    """The empty caption, encoded."""
    return feature_path / "empty_context.npy"


def prompts_folder(feature_path: Path) -> Path:
    """The prompts of logged images."""
    return feature_path / "run_vis"


def count_captions(folder: Path) -> np.ndarray:
    """How many captions each image of a folder has, from the names in it: int64 [N].

    No file is opened or asked for its status: listing half a million names takes about a second.

    Raises:
        InputError: there is no image, a number is missing, an image has no caption, or a caption no image.
    """
    # Millions of names: lists would take gigabytes.
    images, owners, captions = array("q"), array("q"), array("q")
    for name in array_names(folder):
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(f"{folder / name} is named neither <image>.npy nor <image>_<caption>.npy; move it away")
        if match[2] is None:
            images.append(int(match[1]))
        else:
            owners.append(int(match[1]))
            captions.append(int(match[2]))
    images, owners, captions = (np.array(numbers, dtype=int) for numbers in (images, owners, captions))
    images.sort()
    if not len(images):
        raise InputError(f"the feature folder {folder} holds no <image>.npy")
    if gaps := np.flatnonzero(images != np.arange(len(images))).tolist():
        raise InputError(f"{folder / image_name(gaps[0])} is missing: images are numbered from 0 without gaps")
    if lone := owners[owners >= len(images)].tolist():
        raise InputError(f"{folder / image_name(lone[0])} is missing: the image has captions, but no moments")
    return _checked_counts(folder, owners, captions, len(images))


def _checked_counts(folder: Path, owners: np.ndarray, captions: np.ndarray, images: int) -> np.ndarray:
    counts = np.bincount(owners, minlength=images)
    last = np.full(images, -1)
    np.maximum.at(last, owners, captions)
    for image in np.flatnonzero((counts == 0) | (last != counts - 1))[:1].tolist():
        present = set(captions[owners == image].tolist())
        missing = next(number for number in itertools.count() if number not in present)
        raise InputError(
            f"{folder / caption_name(image, missing)} is missing: an image has captions, numbered from 0 without gaps"
        )
    return counts


def read_prompts(feature_path: Path, shape: tuple[int, int]) -> list[tuple[str, np.ndarray]]:
    """The prompts of `run_vis` in the order of their numbers, each with its context, float32 [L, D]; [] without any.

    The files are pickles; nothing in them is executed.

    Args:
        feature_path: holds the folder.
        shape: (L, D) of a context.

    Raises:
        InputError: a file is damaged, or holds anything but a text and a context of that shape.
    """
    folder = prompts_folder(feature_path)
    if not os.path.lexists(folder):
        return []
    names = list(array_names(folder))
    if strangers := [name for name in names if not _NAME.fullmatch(name) or "_" in name]:
        raise InputError(f"{folder / strangers[0]} is not named by a number; move it away")
    names.sort(key=lambda name: int(name.removesuffix(".npy")))
    return [_read_prompt(folder / name, shape) for name in names]


def _read_prompt(path: Path, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
    match read_object_array(path):
        case [str(prompt), np.ndarray() as context] if context.dtype.kind == "f" and context.shape == shape:
            if not np.isfinite(context).all():
                raise InputError(f"{path} holds values that are not finite; make it again")
            return prompt, np.array(context, np.float32)
    raise InputError(f"{path} does not hold a prompt and its context of shape {shape}; make it again")


def write_prompt(path: Path, prompt: str, context: np.ndarray) -> None:
    """Writes a prompt and its context, float32 [L, D], as the official code reads them."""
    pair = np.empty(2, object)
    pair[0], pair[1] = prompt, context
    np.save(path, pair, allow_pickle=True)


class FeatureFilesWriter(ArrayFilesWriter):
    """Writes records of images or of captions, each into the file of its name.

    Args:
        folder: of the files.
        names: of the files, by number.
        shape: of the arrays in them; that of a record without leading axes of length 1.
        manifest: its path, beside the folder.
        contents: of the records.
    """

    def __init__(self, folder: Path, names: Sequence[str], shape: tuple[int, ...], manifest: Path, contents: Contents):
        super().__init__([folder], manifest, contents)
        self.paths, self.shape = [folder / name for name in names], shape
        self.file_bytes = len(array_file(np.zeros(shape, contents.dtype)))

    def files(self, number: int) -> dict[Path, int]:
        return {self.paths[number]: self.file_bytes}

    def write(self, numbers: Sequence[int], records: np.ndarray, labels: Sequence[int]) -> None:
        for number, record in zip(numbers, records.astype(self.contents.dtype), strict=True):
            write_file(self.paths[number], array_file(record.reshape(self.shape)))
