"""How DiT makes the samples that are evaluated during training."""

from typing import Any

from latent_diffusion.evaluation.training import SampleMaker
from latent_diffusion.images import center_crop
from latent_diffusion.vae import vae_settings

from .configuration import DiTConfig
from .image_sampling import ImageSampler
from .sampling import make_sampler

# None: networks in training are compared without it in the paper, and it takes twice the time.
GUIDANCE_SCALE = 1.0


def make_sample_maker(config: DiTConfig, vae: Any, steps: int) -> SampleMaker:
    """Draws images of random classes with DDIM.

    Args:
        config: of the networks that are evaluated.
        vae: of their latents.
        steps: calls of the network for an image.

    Raises:
        InputError: a number of steps that cannot be.
    """
    sampler = make_sampler("ddim", steps)
    return SampleMaker(
        lambda model, seed, indices: ImageSampler(model, vae, sampler, GUIDANCE_SCALE).draw_samples(seed, indices),
        {"sampling_steps": steps} | vae_settings(vae),
        (config.resolution, center_crop),
    )
