"""Features that DiT trains on, in either layout: one file an image (`feature_files`), or packed."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latent_diffusion.errors import InputError
from latent_diffusion.features import FeatureStore, images_to_check, list_arrays, read_array, read_floats
from latent_diffusion.packed import ABSENT, LABELS, MANIFEST, PackedReader, is_packed
from latent_diffusion.reading import naming_errors
from latent_diffusion.records import MOMENTS, check_complete
from latent_diffusion.vae import sample_moments

from .classes import draw_label
from .configuration import DiTConfig
from .feature_files import check_twins, feature_folders, manifest_path


def open_features(feature_path: str | Path, config: DiTConfig, use_flip: bool = False) -> FeatureStore:
    """Opens a feature folder, whichever layout it is in.

    Args:
        feature_path: holds the manifest of packed features, or `imagenet<resolution>_features` and `_labels`.
        config: the backbone; it implies the resolution, the latent shape, the classes and the label dropout.
        use_flip: take mirrored latents half of the time. Packed features with mirrored views always do.

    Raises:
        InputError: the features are in neither layout, damaged, or not what the backbone takes.
    """
    with naming_errors(Path(feature_path)):
        if is_packed(Path(feature_path)):
            return PackedFeatures(feature_path, config, use_flip)
        return FastDiTFeatures(feature_path, config, use_flip)


class LabeledFeatures(FeatureStore):
    """Latents with class labels, some of which are dropped: what both layouts share."""

    def __init__(self, config: DiTConfig):
        self.config, self.latent_shape = config, config.latent_shape

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """ "latents" float32 [C, H, W] and "labels" int64, the null class with probability `class_dropout_prob`."""
        return {name: values[0] for name, values in self.batch([index], [rng]).items()}

    def batch(self, indices: Sequence[int], generators: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        latents = self._draw_latents(indices, generators)
        pairs = zip(indices, generators, strict=True)
        return {
            "latents": latents,
            "labels": np.stack([draw_label(self._label(index), self.config, rng) for index, rng in pairs]),
        }

    @abstractmethod
    def _draw_latents(self, indices: Sequence[int], generators: Sequence[np.random.Generator]) -> np.ndarray:
        """Float32 [B, C, H, W], one of each index and its generator."""

    @abstractmethod
    def _label(self, index: int) -> int: ...


class FastDiTFeatures(LabeledFeatures):
    """Latents and labels in the fastdit layout; the arguments are those of `open_features`.

    Raises:
        InputError: a folder or twin is missing, or one of the files checked up front is bad; the message names it.
    """

    def __init__(self, feature_path: str | Path, config: DiTConfig, use_flip: bool = False):
        super().__init__(config)
        features, labels, flipped = feature_folders(Path(feature_path), config.resolution)
        _check_present(features)
        names = list_arrays(features)
        check_complete(manifest_path(Path(feature_path), config.resolution), "images", len(names))
        # One array: of a million texts every process of the loader would come to have its own copies, by counting
        # references to them.
        self._names = np.array([os.fsencode(name) for name in names])
        self.label_folder = labels
        # Filled as labels are read: the second epoch opens half as many files.
        self._labels = np.full(len(names), -1, dtype=np.int64)
        self.latent_folders = [features] + ([flipped] if use_flip else [])
        for twin in [labels, *self.latent_folders[1:]]:
            check_twins(names, features, twin)
        for index in images_to_check(len(self)):
            self._label(index)
            for folder in self.latent_folders:
                self._latent(folder, index)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Name of the files of an image."""
        return os.fsdecode(bytes(self._names[index]))

    def _draw_latents(self, indices: Sequence[int], generators: Sequence[np.random.Generator]) -> np.ndarray:
        folders = [self.latent_folders[rng.integers(len(self.latent_folders))] for rng in generators]
        return np.stack([self._latent(folder, index) for folder, index in zip(folders, indices, strict=True)])

    def _latent(self, folder: Path, index: int) -> np.ndarray:
        return read_floats(folder / self.name(index), self.config.latent_shape)

    def _label(self, index: int) -> int:
        if self._labels[index] < 0:
            path = self.label_folder / self.name(index)
            label = read_array(path, ())
            _check_class(label, self.config, f"the label file {path}")
            self._labels[index] = label
        return int(self._labels[index])


class PackedFeatures(LabeledFeatures):
    """Packed features; the arguments are those of `open_features`.

    The view of the image and the posterior sample are drawn at every use: an image is seen with other noise and from
    the other side in another epoch. Latents that were sampled before they were packed have their view drawn only.

    Raises:
        InputError: a file is damaged, or the features are not what the backbone takes.
    """

    def __init__(self, feature_path: str | Path, config: DiTConfig, use_flip: bool = False):
        super().__init__(config)
        folder = Path(feature_path)
        self.reader = PackedReader(folder)
        self.contents = self.reader.contents
        if self.contents.latent_shape != config.latent_shape:
            raise InputError(
                f"the features in {folder} are latents {self.contents.latent_shape} of images of "
                f"{self.contents.resolution} pixels, the model takes {config.latent_shape}"
            )
        if use_flip and self.contents.views == 1:
            raise InputError(f"the features in {folder} have no mirrored latents; leave --use_flip out")
        self.numbers = np.flatnonzero(self.reader.labels != ABSENT)
        if not len(self.numbers):
            raise InputError(f"the features in {folder} are of no image: {MANIFEST} lists all as skipped")
        labels = self.reader.labels[self.numbers]
        for number in self.numbers[(labels < 0) | (labels >= config.num_classes)][:1]:
            _check_class(self.reader.labels[number], config, f"record {number} of {folder / LABELS}")

    def __len__(self) -> int:
        return len(self.numbers)

    def _draw_latents(self, indices: Sequence[int], generators: Sequence[np.random.Generator]) -> np.ndarray:
        views = [int(rng.integers(self.contents.views)) for rng in generators]
        values = self.reader.read(self.numbers[indices].tolist(), views)
        if self.contents.content != MOMENTS:
            return values
        noise = np.stack([rng.standard_normal(self.latent_shape, dtype=np.float32) for rng in generators])
        return sample_moments(values, noise) * np.float32(self.contents.scaling_factor)

    def _label(self, index: int) -> int:
        return int(self.reader.labels[self.numbers[index]])


def _check_class(label: np.ndarray, config: DiTConfig, source: str) -> None:
    if label.dtype.kind not in "iu" or not 0 <= label < config.num_classes:
        raise InputError(f"{source} holds {label}, not a class in [0, {config.num_classes})")


def _check_present(features: Path) -> None:
    if not features.is_dir():
        others = sorted(path.name for path in features.parent.glob("imagenet*_features"))
        found = f"; found there: {', '.join(others)}" if others else ""
        raise InputError(
            f"the feature folder {features} does not exist{found}, nor does {features.parent / MANIFEST} of packed "
            "features; make either with extract_features.py, or name another folder with --feature_path"
        )
