"""From class labels to images: the network, the sampler and the VAE that the flags of a command name."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from latent_diffusion import image_sampling
from latent_diffusion.sampling import sample_generators
from latent_diffusion.sampling_arguments import amp_dtype
from latent_diffusion.vae import load_fitting_vae

from .modeling import DiT
from .pretrained import load_dit
from .sampling import make_sampler, sample_latents
from .sampling_arguments import check_config, config_file, find_checkpoint


class ImageSampler(image_sampling.ImageSampler):
    """Draws images of classes."""

    def draw(
        self,
        labels: Sequence[int],
        generators: Sequence[np.random.Generator],
        on_step: Callable[[], object] | None = None,
    ) -> np.ndarray:
        """One image for each label: uint8 [B, H, W, 3].

        Args:
            labels: in [0, num_classes).
            generators: of the noise, one a label.
            on_step: called after each step.

        Raises:
            InputError: a label is out of range, or the images are not finite.
        """
        return self._decoded(sample_latents, [labels], generators, on_step)

    def draw_samples(self, seed: int, indices: Sequence[int]) -> np.ndarray:
        """The samples of these numbers: uint8 [B, H, W, 3]; each is a function of (seed, index).

        The label of sample i and then its noise come from one generator of (seed, i); labels are uniform.

        Raises:
            InputError: the seed is negative, or the images are not finite.
        """
        generators = sample_generators(seed, indices)
        labels = [int(rng.integers(self.model.config.num_classes)) for rng in generators]
        return self.draw(labels, generators)


def load_image_sampler(arguments: argparse.Namespace, device: str) -> ImageSampler:
    """What the flags of `add_sampling_arguments` name, loaded.

    Args:
        arguments: the flags.
        device: "cpu" or "gpu".

    Raises:
        InputError: something is not there, cannot be read, or contradicts another flag.
    """
    sampler = make_sampler(arguments.sampler, arguments.num_sampling_steps)
    model, vae = load_networks(arguments)
    return ImageSampler(
        model,
        vae,
        sampler,
        arguments.cfg_scale,
        tuple(arguments.guidance_interval),
        amp_dtype(device, arguments.dtype),
    )


def load_networks(arguments: argparse.Namespace) -> tuple[DiT, Any]:
    """The network and the VAE that the flags of `add_network_arguments` name.

    Raises:
        InputError: something is not there, cannot be read, or contradicts another flag.
    """
    source = find_checkpoint(arguments)
    model = load_dit(source, config_file(arguments), arguments.use_ema)
    check_config(arguments, model.config, source)
    vae = load_fitting_vae(arguments.vae, model.config.in_channels)
    if arguments.sd_scale_factor:
        vae.register_to_config(scaling_factor=arguments.sd_scale_factor)
    if arguments.enable_flash_attention:
        model.enable_xformers_memory_efficient_attention()
    return model, vae
