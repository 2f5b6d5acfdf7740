"""The fastdit layout: one latent and one label file an image, paired by name.

    <feature_path>/imagenet256_features/<name>.npy       [4, 32, 32] or [1, 4, 32, 32], float16 or float32, scaled
    <feature_path>/imagenet256_labels/<name>.npy         [] or [1], integer
    <feature_path>/imagenet256_features_flip/<name>.npy  latents of the mirrored images (optional)

256 stands for the side of the images in pixels.
"""

from pathlib import Path

import numpy as np

from latent_diffusion.errors import InputError
from latent_diffusion.features import FeatureStore, list_arrays, read_array

from .configuration import DiTConfig

# Opening every file of ImageNet up front would take minutes on a network disk; names are all compared, and this many
# files, evenly spread, are opened. The others are checked when training reads them.
FILES_CHECKED = 256


def feature_folders(feature_path: Path, resolution: int) -> tuple[Path, Path, Path]:
    """Folders of latents, labels and mirrored latents for images of `resolution` pixels."""
    stem = f"imagenet{resolution}"
    return feature_path / f"{stem}_features", feature_path / f"{stem}_labels", feature_path / f"{stem}_features_flip"


class FastDiTFeatures(FeatureStore):
    """Latents and labels in the fastdit layout.

    Args:
        feature_path: folder that holds `imagenet<resolution>_features` and `_labels`.
        config: the backbone; it implies the resolution, the latent shape, the classes and the label dropout.
        use_flip: take the mirrored latents half of the time.

    Raises:
        InputError: a folder or twin is missing, or one of the files checked up front is bad; the message names it.
    """

    def __init__(self, feature_path: str | Path, config: DiTConfig, use_flip: bool = False):
        self.config, self.latent_shape = config, config.latent_shape
        features, labels, flipped = feature_folders(Path(feature_path), config.resolution)
        _check_present(features)
        self.names = list_arrays(features)
        self.label_folder = labels
        # Filled as labels are read: the second epoch opens half as many files.
        self._labels = np.full(len(self.names), -1, dtype=np.int64)
        self.latent_folders = [features] + ([flipped] if use_flip else [])
        for twin in [labels, *self.latent_folders[1:]]:
            _check_twins(self.names, features, twin)
        for index in np.unique(np.linspace(0, len(self) - 1, min(FILES_CHECKED, len(self)), dtype=int)):
            self._label(index)
            for folder in self.latent_folders:
                self._latent(folder, index)

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """ "latents" float32 [C, H, W] and "labels" int64, the null class with probability `class_dropout_prob`."""
        folder = self.latent_folders[rng.integers(len(self.latent_folders))]
        label = self._label(index)
        if rng.random() < self.config.class_dropout_prob:
            label = self.config.num_classes
        return {"latents": self._latent(folder, index), "labels": np.int64(label)}

    def _latent(self, folder: Path, index: int) -> np.ndarray:
        return read_array(folder / self.names[index], self.config.latent_shape).astype("float32")

    def _label(self, index: int) -> int:
        if self._labels[index] < 0:
            self._labels[index] = self._read_label(index)
        return int(self._labels[index])

    def _read_label(self, index: int) -> int:
        path = self.label_folder / self.names[index]
        label = read_array(path, ())
        if label.dtype.kind not in "iu" or not 0 <= label < self.config.num_classes:
            raise InputError(f"the label file {path} holds {label}, not a class in [0, {self.config.num_classes})")
        return int(label)


def _check_present(features: Path) -> None:
    if not features.is_dir():
        others = sorted(path.name for path in features.parent.glob("imagenet*_features"))
        found = f"; found there: {', '.join(others)}" if others else ""
        raise InputError(
            f"the feature folder {features} does not exist{found}; make it with extract_features.py, "
            "or name another folder with --feature_path"
        )


def _check_twins(names: list[str], features: Path, twin: Path) -> None:
    others = list_arrays(twin)
    if names == others:
        return
    first, second = set(names), set(others)
    if lone := sorted(first - second):
        raise InputError(f"{twin / lone[0]} is missing: its twin {features / lone[0]} exists ({len(lone)} such)")
    lone = sorted(second - first)
    raise InputError(f"{features / lone[0]} is missing: its twin {twin / lone[0]} exists ({len(lone)} such)")
