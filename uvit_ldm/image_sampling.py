"""From encoded captions to images: a network, a sampler and a VAE."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latent_diffusion import image_sampling
from latent_diffusion.pretrained import PIPELINE_INDEX
from latent_diffusion.sampling import sample_generators
from latent_diffusion.vae import load_fitting_vae

from .modeling import UViT
from .pretrained import read_pretrained
from .sampling import sample_latents


class Captions(Protocol):
    """What images are drawn of: the images of `CocoFeatures` with their captions, or `Prompts`.

    Attributes:
        empty_context: of the empty caption, float32 [L, D].
    """

    empty_context: np.ndarray

    def __len__(self) -> int: ...

    def draw_contexts(self, indices: Sequence[int], generators: Sequence[np.random.Generator]) -> np.ndarray:
        """A caption of each of these numbers, encoded: float32 [B, L, D]."""

    def settings(self) -> dict[str, str]:
        """What the contexts are a function of, by checksums."""


@dataclass(frozen=True, eq=False)
class ImageSampler(image_sampling.ImageSampler):
    """Draws images of captions.

    Attributes:
        captions: what samples are drawn of.
    """

    captions: Captions = field(kw_only=True)

    def draw(
        self,
        contexts: np.ndarray,
        generators: Sequence[np.random.Generator],
        on_step: Callable[[], object] | None = None,
    ) -> np.ndarray:
        """One image for each encoded caption: uint8 [B, H, W, 3].

        Args:
            contexts: float32 [B, L, D].
            generators: of the noise, one a caption.
            on_step: called after each step.

        Raises:
            InputError: the contexts are not of the network's shape, or the images are not finite.
        """
        return self._decoded(sample_latents, [contexts, self.captions.empty_context], generators, on_step)

    def draw_samples(self, seed: int, indices: Sequence[int]) -> np.ndarray:
        """The samples of these numbers: uint8 [B, H, W, 3]; each is a function of (seed, index).

        Sample i is drawn of number `i % len(captions)` of the captions; where there are several of that number, which
        one and then the noise come from one generator of (seed, i).

        Raises:
            InputError: the seed is negative, or the images are not finite.
        """
        generators = sample_generators(seed, indices)
        contexts = self.captions.draw_contexts([index % len(self.captions) for index in indices], generators)
        return self.draw(contexts, generators)


def load_networks(
    source: Path, vae_name: str, config_file: Path | None = None, use_ema: bool = True
) -> tuple[UViT, Any]:
    """The network in `source` (see `read_pretrained`) and the VAE of its latents, an `AutoencoderKL`.

    The VAE gets the network's scaling factor, unless both are of one pipeline folder: there the VAE's own factor is
    right, even where its weights were made for another one than the network's.

    Raises:
        InputError: something is not there, cannot be read, or does not belong together.
    """
    pretrained = read_pretrained(source, config_file, use_ema)
    vae = load_fitting_vae(vae_name, pretrained.config.in_channels)
    if not _is_part_of(source, vae_name):
        vae.register_to_config(scaling_factor=pretrained.config.scaling_factor)
    return pretrained.network(), vae


def _is_part_of(source: Path, vae_name: str) -> bool:
    return (source / PIPELINE_INDEX).is_file() and Path(vae_name).absolute().parent == source.absolute()
