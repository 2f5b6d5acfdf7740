"""From prompts to images: ppdiffusers' `StableDiffusionXLPipeline` around the network that is trained."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from latent_diffusion.checkpoint import rng_state, set_rng_state
from latent_diffusion.configuration import VAE_DOWNSAMPLING
from latent_diffusion.sampling import draw_noise
from latent_diffusion.vae import decode_latents

from .text_encoders import TextEncoders

# Images are drawn together up to so many, and up to so many pixels: beside a run that trains memory is scarce.
MOST_IMAGES, MOST_PIXELS = 16, 1024**2


@dataclass(frozen=True, eq=False)
class Condition:
    """Encoded prompts.

    Attributes:
        contexts: float [B, L, D].
        pooled: float [B, P].
    """

    contexts: paddle.Tensor
    pooled: paddle.Tensor

    def __len__(self) -> int:
        return self.contexts.shape[0]

    def __getitem__(self, rows: slice) -> "Condition":
        return Condition(self.contexts[rows], self.pooled[rows])

    def repeated(self, times: int) -> "Condition":
        """Each prompt so often, one after the other."""
        return Condition(*(values.repeat_interleave(times, axis=0) for values in (self.contexts, self.pooled)))

    def zeros(self) -> "Condition":
        """What most pipelines of SDXL take for the empty prompt: [1, L, D] and [1, P]."""
        return Condition(paddle.zeros_like(self.contexts[:1]), paddle.zeros_like(self.pooled[:1]))

    @classmethod
    def of(cls, prompts: Sequence[str], encoders: TextEncoders) -> "Condition":
        """The prompts as the encoders encode them."""
        return cls(*encoders.encode_texts(prompts))


@dataclass(frozen=True, eq=False)
class ImageSampler:
    """Draws images of prompts.

    Attributes:
        vae: the `AutoencoderKL` of the latents.
        scheduler: of ppdiffusers.
        resolution: side of the images in pixels.
        steps: of the scheduler.
        guidance_scale: 1 for none.
        zeros_for_empty: guidance leads away from zeros, not from the empty prompt.
    """

    vae: Any
    scheduler: Any
    resolution: int
    steps: int
    guidance_scale: float
    zeros_for_empty: bool

    def encode(self, prompts: Sequence[str], encoders: TextEncoders) -> tuple[Condition, Condition]:
        """The prompts, and what guidance leads away from."""
        condition = Condition.of(prompts, encoders)
        return condition, condition.zeros() if self.zeros_for_empty else Condition.of([""], encoders)

    def draw(
        self, unet: Any, condition: Condition, empty: Condition, generators: Sequence[np.random.Generator]
    ) -> np.ndarray:
        """One image for each encoded prompt: uint8 [B, H, W, 3].

        Args:
            unet: the network, in eval mode.
            condition: of B prompts.
            empty: of one, see `encode`.
            generators: of the noise, one a prompt.

        Raises:
            NotFiniteError: the images are not finite.
        """
        size = min(max(MOST_PIXELS // self.resolution**2, 1), MOST_IMAGES)
        parts = (slice(start, start + size) for start in range(0, len(condition), size))
        pipeline = self._pipeline(unet)
        drawn = [self._draw_batch(pipeline, condition[rows], empty, generators[rows]) for rows in parts]
        return np.concatenate(drawn)

    @paddle.no_grad()
    def _draw_batch(self, pipeline: Any, condition: Condition, empty: Condition, generators) -> np.ndarray:
        side = self.resolution // VAE_DOWNSAMPLING
        contexts, pooled = condition.contexts, condition.pooled
        noise = draw_noise(generators, (self.vae.config.latent_channels, side, side))
        with _seeded(generators[0]):
            latents = pipeline(
                prompt_embeds=contexts,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=empty.contexts.expand_as(contexts),
                negative_pooled_prompt_embeds=empty.pooled.expand_as(pooled),
                height=self.resolution,
                width=self.resolution,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                latents=noise.astype(contexts.dtype),
                output_type="latent",
            ).images
        return decode_latents(self.vae, latents, batch_size=1)

    def _pipeline(self, unet):
        from ppdiffusers import StableDiffusionXLPipeline

        pipeline = StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=self.scheduler,
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@contextlib.contextmanager
def _seeded(generator: np.random.Generator) -> Iterator[None]:
    """Paddle's generators, from which some schedulers draw, seeded for a while; afterwards all are as before."""
    state = rng_state()
    paddle.seed(int(generator.integers(2**31)))
    try:
        yield
    finally:
        set_rng_state(state)
