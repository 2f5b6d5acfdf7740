"""Sampling many images with any number of processes: the same images whatever that number is.

Label and noise of image i come from one generator of (seed, i). Images are computed in batches of consecutive
indices; process r takes every batch b with b % processes == r. So the batch an image is computed in does not depend
on the number of processes.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import paddle

from latent_diffusion.progress import progress
from latent_diffusion.sample_folder import SampleFolder
from latent_diffusion.sampling import sample_generators

from .image_sampling import ImageSampler


def settings(sampler: ImageSampler, seed: int, batch_size: int) -> dict[str, Any]:
    """What the images of a folder are a function of, as plain values; weights by their checksums."""
    return {
        "model": _checksum(sampler.model),
        "vae": _checksum(sampler.vae),
        "scaling_factor": sampler.vae.config.scaling_factor,
        "sampler": sampler.sampler.name,
        "num_sampling_steps": sampler.sampler.steps,
        "cfg_scale": sampler.guidance_scale,
        "amp_dtype": sampler.amp_dtype,
        "seed": seed,
        "batch_size": batch_size,
    }


def _checksum(layer: paddle.nn.Layer) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(layer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def fill(
    folder: SampleFolder, sampler: ImageSampler, seed: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> None:
    """Draws this process's share of the images that `folder` lacks; process 0 returns when all are there.

    Raises:
        InputError: the seed is negative.
    """
    if rank > 0:
        _draw_share(folder, sampler, seed, batch_size, rank, world_size, on_batch=lambda: None)
        return
    with progress(total=folder.count, desc="sampling", unit="image") as bar:

        def show() -> None:
            bar.update(folder.finished() - bar.n)

        show()
        _draw_share(folder, sampler, seed, batch_size, rank, world_size, on_batch=show)
        folder.wait(show)


def _draw_share(
    folder: SampleFolder,
    sampler: ImageSampler,
    seed: int,
    batch_size: int,
    rank: int,
    world_size: int,
    on_batch: Callable[[], object],
) -> None:
    classes = sampler.model.config.num_classes
    for start in range(rank * batch_size, folder.count, world_size * batch_size):
        # The last batch, too, is computed whole: a later run for more images continues with the same ones.
        indices = range(start, start + batch_size)
        if not (missing := folder.missing(indices)):
            continue
        generators = sample_generators(seed, indices)
        labels = [int(rng.integers(classes)) for rng in generators]
        images = sampler.draw(labels, generators)
        for index in missing:
            folder.save(index, images[index - start])
        on_batch()
