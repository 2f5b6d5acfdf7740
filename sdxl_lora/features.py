"""Training samples of SDXL: images that the trainer encodes, or latents and contexts from the cache of `extraction`.

What is drawn for a sample, in this order: its caption, where an image has several; whether it is mirrored, with
`random_flip`; top and left of its crop, unless it is the center; and the noise of the posterior. The cache draws a crop
once, before, and the rest likewise.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latent_diffusion.configuration import VAE_DOWNSAMPLING
from latent_diffusion.errors import InputError
from latent_diffusion.features import FeatureStore, read_floats
from latent_diffusion.images import naming_image
from latent_diffusion.packed import PackedReader, count_texts
from latent_diffusion.records import TextContents, is_count
from latent_diffusion.vae import sample_moments

from .dataset import CaptionedImages
from .micro_conditioning import (
    TIME_IDS,
    center_position,
    crop,
    make_time_ids,
    mirror,
    random_position,
    resize_shorter_side,
)

# In the folder of a cache.
IMAGES, CAPTIONS, TIME_IDS_FILE = "images", "captions", "time_ids.npy"


class Captions(ABC):
    """What a network is told of an image by its caption."""

    @abstractmethod
    def draw(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Of one of the captions of an image, drawn from `rng`; where there is only one, nothing is drawn."""


class TokenizedCaptions(Captions):
    """Captions as tokens, for text encoders that are trained or run beside the network.

    Args:
        images: that have the captions.
        tokenize: `TextEncoders.tokenize`.
    """

    def __init__(self, images: CaptionedImages, tokenize: Callable[[str], dict[str, np.ndarray]]):
        self.images, self.tokenize = images, tokenize

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """ "tokens" and "tokens_2", int64 [L]."""
        return self.tokenize(self.images.caption(index, rng))


class OnlineFeatures(FeatureStore):
    """Images for the trainer to encode, read from the dataset at every use.

    Args:
        images: to train on.
        tokenize: `TextEncoders.tokenize`.
        latent_channels: of the VAE, which downsamples by `VAE_DOWNSAMPLING`.
        resolution: side in pixels that images are brought to, a multiple of that.
        center_crop: crop the middle, not a random part.
        random_flip: mirror half of the images.
    """

    def __init__(
        self,
        images: CaptionedImages,
        tokenize: Callable[[str], dict[str, np.ndarray]],
        latent_channels: int,
        resolution: int,
        center_crop: bool,
        random_flip: bool,
    ):
        self.images, self.captions = images, TokenizedCaptions(images, tokenize)
        self.latent_shape = latent_channels, resolution // VAE_DOWNSAMPLING, resolution // VAE_DOWNSAMPLING
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One sample; see the module for what is drawn.

        Returns:
            "images" uint8 [R, R, 3], "posterior_noise" float32 [C, h, w], "time_ids" float32 [6], "tokens" and
            "tokens_2" int64 [L].

        Raises:
            InputError: the image cannot be read.
        """
        tokens = self.captions.draw(index, rng)
        original, image = read_resized(self.images, index, self.resolution)
        if self.random_flip and _is_mirrored(rng):
            image = mirror(image)
        position = choose_position(image, self.resolution, self.center_crop, rng)
        return {
            "images": crop(image, position, self.resolution),
            "posterior_noise": rng.standard_normal(self.latent_shape, dtype=np.float32),
            "time_ids": make_time_ids(original, position, self.resolution),
            **tokens,
        }


class CachedFeatures(FeatureStore):
    """Latents, sampled anew at every use, and captions of a cache.

    Args:
        folder: from `cache_features`.
        captions: where the text encoders are trained, `TokenizedCaptions` of the same images; None for the encoded ones
            of the cache.

    Raises:
        InputError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, captions: Captions | None = None):
        self.images = PackedReader(folder / IMAGES)
        self.latent_shape = self.images.contents.latent_shape
        self.time_ids = read_floats(folder / TIME_IDS_FILE, (len(self), TIME_IDS))
        self.captions = captions or EncodedCaptions(folder / CAPTIONS, self.images)

    def __len__(self) -> int:
        return self.images.contents.records

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One sample; see the module for what is drawn.

        Returns:
            "latents" float32 [C, h, w], scaled; "time_ids" float32 [6]; and "contexts" float32 [L, D] with "pooled"
            float32 [P], or "tokens" and "tokens_2" int64 [L].

        Raises:
            InputError: a record cannot be read, or holds values that are not finite.
        """
        condition = self.captions.draw(index, rng)
        contents = self.images.contents
        view = int(contents.views == 2 and _is_mirrored(rng))
        noise = rng.standard_normal(self.latent_shape, dtype=np.float32)
        moments = self.images.read([index], [view])[0]
        return {
            "latents": sample_moments(moments, noise) * np.float32(contents.scaling_factor),
            "time_ids": self.time_ids[index],
            **condition,
        }


@dataclass(frozen=True)
class PromptContents(TextContents):
    """What a set of captions is that were encoded by both text encoders.

    Attributes:
        record_shape: (1, 1, 1, L * D + P): the contexts [L, D] row by row, then the pooled values.
        tokens: L.
        pooled_width: P.
    """

    tokens: int
    pooled_width: int

    VALID = TextContents.VALID | {"tokens": is_count, "pooled_width": is_count}

    @property
    def context_shape(self) -> tuple[int, int]:
        """(L, D)."""
        return self.tokens, (self.record_shape[-1] - self.pooled_width) // self.tokens

    @classmethod
    def from_manifest(cls, values: dict[str, Any], path: Path) -> "PromptContents":
        contents = super().from_manifest(values, path)
        length, width = contents.context_shape
        if width < 1 or (1, 1, 1, length * width + contents.pooled_width) != contents.record_shape:
            raise InputError(
                f"{path} has record_shape {list(contents.record_shape)}, which is not of {length} tokens and "
                f"{contents.pooled_width} pooled values; it is damaged"
            )
        return contents


class EncodedCaptions(Captions):
    """The encoded captions of a cache.

    Args:
        folder: in the packed layout, of `PromptContents`.
        images: the records of their images.

    Raises:
        InputError: a file is missing or damaged, or the captions are of other images.
    """

    def __init__(self, folder: Path, images: PackedReader):
        self.reader = PackedReader(folder, PromptContents)
        self.counts = count_texts(images, self.reader)
        self._first = np.cumsum(self.counts) - self.counts

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """ "contexts" float32 [L, D] and "pooled" float32 [P]."""
        caption = int(self._first[index]) + int(rng.integers(self.counts[index]))
        record, contents = self.reader.read([caption], [0]).reshape(-1), self.reader.contents
        contexts, pooled = np.split(record, [record.size - contents.pooled_width])
        return {"contexts": contexts.reshape(contents.context_shape), "pooled": pooled}


def read_resized(images: CaptionedImages, index: int, resolution: int) -> tuple[Image.Image, Image.Image]:
    """An image as it was read, and with its shorter side brought to `resolution` pixels.

    Raises:
        InputError: it cannot be read, or is too long for its width.
    """
    original = images.image(index)
    with naming_image(images.name(index)):
        return original, resize_shorter_side(original, resolution)


def choose_position(
    image: Image.Image, resolution: int, center_crop: bool, rng: np.random.Generator
) -> tuple[int, int]:
    """Top and left of the square that is cropped from a resized image; nothing is drawn for the center."""
    return center_position(image, resolution) if center_crop else random_position(image, resolution, rng)


def _is_mirrored(rng: np.random.Generator) -> bool:
    return rng.random() < 0.5
