"""Features of COCO that U-ViT trains on, in either layout: files of images and captions (`feature_files`) or packed."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latent_diffusion.errors import InputError
from latent_diffusion.features import FeatureStore, images_to_check, read_floats
from latent_diffusion.packed import PackedReader, count_texts, is_packed
from latent_diffusion.reading import naming_errors
from latent_diffusion.records import MOMENTS, TextContents, check_complete
from latent_diffusion.vae import sample_moments

from .configuration import CONDITION_DROPOUT, UViTConfig
from .feature_files import (
    caption_name,
    count_captions,
    empty_context_path,
    image_name,
    manifest_path,
    packed_folder,
)

# Of what is found in place of features; it may be the half million files of a split.
NAMES_SHOWN = 8


def open_features(feature_path: str | Path, config: UViTConfig, split: str = "train") -> "CocoFeatures":
    """Opens a feature folder, whichever layout it is in.

    Args:
        feature_path: holds a folder of the split's name and `empty_context.npy`.
        config: the backbone; it implies the shapes of latents and contexts.
        split: "train" or "val"; only in "train" are captions dropped.

    Raises:
        InputError: the features are in neither layout, damaged, or not what the backbone takes.
    """
    folder = Path(feature_path)
    with naming_errors(folder):
        _check_present(folder, split)
        if is_packed(packed_folder(folder, split, "images")):
            return PackedCocoFeatures(folder, config, split)
        return CocoFileFeatures(folder, config, split)


class CocoFeatures(FeatureStore):
    """Latents with encoded captions, some of which are dropped: what both layouts share.

    Attributes:
        empty_context: the empty caption, encoded: float32 [L, D].
        captions: how many captions each image has: int64 [N].
    """

    captions: np.ndarray

    def __init__(self, folder: Path, config: UViTConfig, split: str):
        self.latent_shape, self.context_shape = config.latent_shape, config.context_shape
        self.scaling_factor = np.float32(config.scaling_factor)
        channels, *sides = config.latent_shape
        self.moments_shape = (2 * channels, *sides)
        self.dropout = CONDITION_DROPOUT if split == "train" else 0.0
        self.empty_context = read_floats(empty_context_path(folder), config.context_shape)

    def __len__(self) -> int:
        return len(self.captions)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draws from the posterior, then the caption, then whether it is dropped.

        Returns:
            "latents" float32 [C, H, W], scaled, and "contexts" float32 [L, D], of the empty caption with probability
            `CONDITION_DROPOUT` in training.
        """
        noise = rng.standard_normal(self.latent_shape, dtype=np.float32)
        caption = int(rng.integers(self.captions[index]))
        dropped = rng.random() < self.dropout
        return {
            "latents": sample_moments(self._moments(index), noise) * self.scaling_factor,
            "contexts": self.empty_context if dropped else self._context(index, caption),
        }

    def draw_contexts(self, indices: Sequence[int], generators: Sequence[np.random.Generator]) -> np.ndarray:
        """One of the captions of each of these images, encoded: float32 [B, L, D]."""
        drawn = (
            self._context(index, int(rng.integers(self.captions[index])))
            for index, rng in zip(indices, generators, strict=True)
        )
        return np.stack(list(drawn))

    def settings(self) -> dict[str, str]:
        """What `draw_contexts` is a function of: a checksum of some contexts, and of how many there are of each image.

        Whatever is encoded anew or in another order changes all of them, and reading all would take long.
        """
        digest = hashlib.sha256(np.asarray(self.captions, np.int64).tobytes())
        for context in [self.empty_context, *(self._context(i, 0) for i in images_to_check(len(self)).tolist())]:
            digest.update(context.tobytes())
        return {"captions": digest.hexdigest()}

    @abstractmethod
    def _moments(self, index: int) -> np.ndarray:
        """Float32 [2 C, H, W]."""

    @abstractmethod
    def _context(self, index: int, caption: int) -> np.ndarray:
        """Float32 [L, D]."""


class CocoFileFeatures(CocoFeatures):
    """Features of U-ViT's own layout; the arguments are those of `open_features`.

    Raises:
        InputError: a file is missing, or one of those checked up front is bad; the message names it.
    """

    def __init__(self, folder: Path, config: UViTConfig, split: str):
        super().__init__(folder, config, split)
        self.folder = folder / split
        self.captions = count_captions(self.folder)
        for kind, count in (("images", len(self)), ("captions", int(self.captions.sum()))):
            check_complete(manifest_path(folder, split, kind), kind, count)
        for index in images_to_check(len(self)).tolist():
            self._moments(index)
            for caption in range(self.captions[index]):
                self._context(index, caption)

    def _moments(self, index: int) -> np.ndarray:
        return read_floats(self.folder / image_name(index), self.moments_shape)

    def _context(self, index: int, caption: int) -> np.ndarray:
        return read_floats(self.folder / caption_name(index, caption), self.context_shape)


class PackedCocoFeatures(CocoFeatures):
    """Packed features; the arguments are those of `open_features`.

    Raises:
        InputError: a file is damaged, or the features are not what the backbone takes.
    """

    def __init__(self, folder: Path, config: UViTConfig, split: str):
        super().__init__(folder, config, split)
        self.images = PackedReader(packed_folder(folder, split, "images"))
        self.contexts = PackedReader(packed_folder(folder, split, "captions"), TextContents)
        contents = self.images.contents
        if (contents.content, contents.latent_shape) != (MOMENTS, config.latent_shape):
            raise InputError(
                f"the features in {self.images.folder} are {contents.content} of latents {contents.latent_shape}, the "
                f"model takes moments of {config.latent_shape}"
            )
        if (found := self.contexts.contents.context_shape) != config.context_shape:
            raise InputError(
                f"the features in {self.contexts.folder} are contexts {found}, the model takes {config.context_shape}"
            )
        self.captions = count_texts(self.images, self.contexts)
        self._first = np.cumsum(self.captions) - self.captions

    def _moments(self, index: int) -> np.ndarray:
        return self.images.read([index], [0])[0]

    def _context(self, index: int, caption: int) -> np.ndarray:
        return self.contexts.read([int(self._first[index]) + caption], [0])[0, 0]


def _check_present(folder: Path, split: str) -> None:
    for kind in ("images", "captions"):
        partial = packed_folder(folder, split, f"{kind}.partial")
        if partial.exists():
            raise InputError(f"{partial} is there: the extraction is not complete; run the same command again")
    if (folder / split).is_dir():
        return
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = f"; found there: {', '.join(names[:NAMES_SHOWN])}" if names else ""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    raise InputError(
        f"the feature folder {folder / split} does not exist{found}{more}; make it with extract_coco_features.py, or "
        "name another folder with --feature_path"
    )
