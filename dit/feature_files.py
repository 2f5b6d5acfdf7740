"""The fastdit layout on disk: one latent and one label file an image, paired by name.

    <folder>/imagenet256_features/<name>.npy       [4, 32, 32] or [1, 4, 32, 32], float16 or float32, scaled
    <folder>/imagenet256_labels/<name>.npy         [] or [1], integer
    <folder>/imagenet256_features_flip/<name>.npy  latents of the mirrored images (optional)
    <folder>/imagenet256_manifest.json             what extraction knows of them (optional)

256 stands for the side of the images in pixels.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from latent_diffusion.array_files import ArrayFilesWriter, array_file, write_file
from latent_diffusion.errors import InputError
from latent_diffusion.features import array_names, array_of, list_arrays, read_content
from latent_diffusion.npy import naming_damage, read_header
from latent_diffusion.reading import naming_errors, open_regular
from latent_diffusion.records import LATENTS, ImageContents, RecordReader, read_manifest, skipped_images

from .configuration import VAE_DOWNSAMPLING

# No leading zeros: two names would be of one number.
_NUMBERED = re.compile(r"(0|[1-9][0-9]{0,17})\.npy")

# Of the int64 that labels are written as.
_MAX_LABEL = 2**63 - 1


def feature_folders(feature_path: Path, resolution: int) -> tuple[Path, Path, Path]:
    """Folders of latents, labels and mirrored latents for images of `resolution` pixels."""
    stem = f"imagenet{resolution}"
    return feature_path / f"{stem}_features", feature_path / f"{stem}_labels", feature_path / f"{stem}_features_flip"


def manifest_path(feature_path: Path, resolution: int) -> Path:
    """The manifest beside the folders."""
    return feature_path / f"imagenet{resolution}_manifest.json"


def check_twins(names: list[str], features: Path, twin: Path) -> None:
    """Raises `InputError` unless the folder `twin` holds the arrays `names` that `features` holds."""
    others = set(array_names(twin))
    if lone := sorted(others.symmetric_difference(names)):
        absent, present = (features, twin) if lone[0] in others else (twin, features)
        raise InputError(f"{absent / lone[0]} is missing: its twin {present / lone[0]} exists ({len(lone)} such)")


class FeatureFilesWriter(ArrayFilesWriter):
    """Writes the fastdit layout; the files of image i are called `i.npy`."""

    def __init__(self, folder: Path, contents: ImageContents):
        latents, self.labels, flipped = feature_folders(folder, contents.resolution)
        self.views = [latents, flipped][: contents.views]
        super().__init__([*self.views, self.labels], manifest_path(folder, contents.resolution), contents)
        self.latent_bytes = len(array_file(np.zeros((1, *contents.latent_shape), contents.dtype)))
        self.label_bytes = len(_label_file(0))

    def files(self, number: int) -> dict[Path, int]:
        name = f"{number}.npy"
        return {folder / name: self.latent_bytes for folder in self.views} | {self.labels / name: self.label_bytes}

    def write(self, numbers: Sequence[int], records: np.ndarray, labels: Sequence[int]) -> None:
        for number, record, label in zip(numbers, records.astype(self.contents.dtype), labels, strict=True):
            contents = [*(array_file(latent[None]) for latent in record), _label_file(label)]
            for path, content in zip(self.files(number), contents, strict=True):
                write_file(path, content)


class FeatureFilesReader(RecordReader):
    """Reads the fastdit layout, of extraction or of another program.

    Without a manifest, files are numbered in their order.

    Args:
        folder: holds `imagenet<resolution>_features` and `_labels` of one resolution.
        scaling_factor: of the VAE; needed without a manifest, and no other than it says with one.

    Raises:
        InputError: a folder, a twin or the scaling factor is missing, or the manifest says something else.
    """

    def __init__(self, folder: Path, scaling_factor: float | None = None):
        with naming_errors(folder):
            self._open(folder, _resolution(folder), scaling_factor)

    def _open(self, folder: Path, resolution: int, scaling_factor: float | None) -> None:
        latents, self.labels, flipped = feature_folders(folder, resolution)
        self.views = [latents, flipped] if flipped.is_dir() else [latents]
        self.manifest, self.sha256, self.skipped = manifest_path(folder, resolution), None, []
        names = list_arrays(latents)
        for twin in (self.labels, *self.views[1:]):
            check_twins(names, latents, twin)
        if os.path.lexists(self.manifest):
            self._read_manifest(names, scaling_factor)
        else:
            self._describe(names, resolution, scaling_factor)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, int]]:
        digest = hashlib.sha256()
        for number, name in self.names.items():
            record = np.stack([self._latent(folder / name, digest) for folder in self.views])
            yield number, record, self._label(self.labels / name, digest)
        if self.sha256 not in (None, digest.hexdigest()):
            raise InputError(
                f"the features are not those whose checksum {self.manifest} has; run extract_features.py again"
            )

    def _read_manifest(self, names: list[str], scaling_factor: float | None) -> None:
        values = read_manifest(self.manifest)
        self.contents = ImageContents.from_manifest(values, self.manifest)
        self.sha256, self.skipped = values.get("sha256"), skipped_images(values, self.manifest)
        if not isinstance(self.sha256, str):
            raise InputError(f"{self.manifest} has no checksum of the features; it is damaged")
        if scaling_factor not in (None, self.contents.scaling_factor):
            raise InputError(
                f"--scaling-factor {scaling_factor} contradicts {self.manifest}, which says "
                f"{self.contents.scaling_factor}"
            )
        if len(self.views) != self.contents.views:
            raise InputError(
                f"{self.manifest} says each image has {self.contents.views} latents, not {len(self.views)}"
            )
        for name in names:
            if not _NUMBERED.fullmatch(name) or _number(name) >= self.contents.records:
                raise InputError(f"{self.views[0] / name} is no file of the {self.contents.records} of {self.manifest}")
        if len(names) + len(self.skipped) != self.contents.records:
            raise InputError(
                f"{self.manifest} says there are {self.contents.records} images, {len(self.skipped)} of them skipped, "
                f"but there are {len(names)}"
            )
        self.names = {_number(name): name for name in names}

    def _describe(self, names: list[str], resolution: int, scaling_factor: float | None) -> None:
        if scaling_factor is None:
            raise InputError(
                f"{self.manifest} does not exist: say with --scaling-factor what the latents were multiplied by "
                "(0.18215 for the VAE of Stable Diffusion)"
            )
        self.names = dict(enumerate(names))
        path = self.views[0] / names[0]
        with naming_damage(path), open_regular(path) as file:
            first = read_header(file)
        sides = (resolution // VAE_DOWNSAMPLING,) * 2
        latent = first.shape[1:] if first.shape[:1] == (1,) and len(first.shape) == 4 else first.shape
        if len(latent) != 3 or latent[0] == 0 or latent[1:] != sides or first.dtype.name not in ("float16", "float32"):
            raise InputError(
                f"{path} holds {first.dtype} {first.shape}, not float16 or float32 latents [C, {sides[0]}, {sides[1]}]"
            )
        shape = (len(self.views), *latent)
        self.contents = ImageContents(LATENTS, shape, first.dtype.name, len(names), resolution, scaling_factor)

    def _latent(self, path: Path, digest) -> np.ndarray:
        latent = self._array(path, self.contents.latent_shape, digest)
        if latent.dtype != self.contents.dtype:
            raise InputError(f"{path} holds {latent.dtype}, the others {self.contents.dtype}")
        return latent

    def _label(self, path: Path, digest) -> int:
        label = self._array(path, (), digest)
        if label.dtype.kind not in "iu" or not 0 <= label <= _MAX_LABEL:
            raise InputError(f"the label file {path} holds {label}, not the number of a class")
        return int(label)

    def _array(self, path: Path, shape: tuple[int, ...], digest) -> np.ndarray:
        content = read_content(path, shape)
        digest.update(content)
        return array_of(content, path, shape)


def _number(name: str) -> int:
    return int(name.removesuffix(".npy"))


def _resolution(folder: Path) -> int:
    """The one resolution that a folder holds features of."""
    found = [re.fullmatch(r"imagenet([1-9]\d*)_features", path.name) for path in sorted(folder.glob("imagenet*"))]
    resolutions = [int(match[1]) for match in found if match]
    if len(resolutions) != 1:
        raise InputError(f"{folder} must hold one folder imagenet<resolution>_features, but holds {len(resolutions)}")
    if resolutions[0] % VAE_DOWNSAMPLING:
        raise InputError(f"{folder} holds features of {resolutions[0]} pixels, no multiple of {VAE_DOWNSAMPLING}")
    return resolutions[0]


def _label_file(label: int) -> bytes:
    return array_file(np.array([label], dtype=np.int64))
