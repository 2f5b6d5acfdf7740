"""What the image samplers of DiT and U-ViT have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from . import precision
from .guidance import ALL_STEPS
from .vae import decode_latents


@dataclass(frozen=True, eq=False)
class ImageSampler(ABC):
    """Draws images. A subclass says of what.

    Attributes:
        model: the network.
        vae: the `AutoencoderKL` of its latents, which its `config.scaling_factor` scales.
        sampler: from the system's `make_sampler`.
        guidance_scale: as the system's `sample_latents` counts it; 1 for none.
        guidance_interval: where guidance acts, see `sample_latents`.
        amp_dtype: "float16" or "bfloat16" for the network's matrix products, None for float32.
    """

    model: Any
    vae: Any
    sampler: Any
    guidance_scale: float
    guidance_interval: tuple[float, float] = ALL_STEPS
    amp_dtype: str | None = None

    @abstractmethod
    def draw_samples(self, seed: int, indices: Sequence[int]) -> np.ndarray:
        """The samples of these numbers: uint8 [B, H, W, 3]; each is a function of (seed, index).

        Raises:
            InputError: the seed is negative, or the images are not finite.
        """

    def _decoded(
        self,
        sample_latents: Callable[..., paddle.Tensor],
        condition: Sequence[Any],
        generators: Sequence[np.random.Generator],
        on_step: Callable[[], object] | None,
    ) -> np.ndarray:
        """Images uint8 [B, H, W, 3] of the latents that the system's `sample_latents` gives for a condition."""
        with precision.autocast(self.amp_dtype):
            latents = sample_latents(
                self.model,
                *condition,
                self.sampler,
                self.guidance_scale,
                generators,
                on_step,
                self.guidance_interval,
            )
        return decode_latents(self.vae, latents)
