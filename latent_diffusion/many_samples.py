"""Sampling many images with any number of processes: the same images whatever that number is.

What is random in image i comes from one generator of (seed, i). Images are computed in batches of consecutive
indices; process r takes every batch b with b % processes == r. So the batch an image is computed in does not depend
on the number of processes.
"""

from collections.abc import Callable
from typing import Any

from . import distributed
from .guidance import ALL_STEPS
from .image_sampling import ImageSampler
from .pretrained import checksum
from .progress import progress
from .sample_folder import SampleFolder
from .vae import vae_settings


def sample(folder: SampleFolder, sampler: ImageSampler, seed: int, batch_size: int, further: dict[str, Any]) -> None:
    """Makes or completes a folder of samples and its archive; all processes of a launched run call it.

    Args:
        folder: of the images that are wanted.
        sampler: draws them.
        seed: of all that is random.
        batch_size: images that a process draws at a time.
        further: what they depend on beside `settings`, as plain values.

    Raises:
        InputError: see `SampleFolder.prepare`, or the seed is negative.
    """
    rank, world_size = distributed.start()
    if rank == 0:
        print(f"sampling into {folder.path}, processes: {world_size}", flush=True)
        folder.prepare(settings(sampler, seed, batch_size) | further)
    distributed.barrier()
    fill(folder, sampler, seed, batch_size, rank, world_size)
    if rank == 0:
        print(f"wrote {folder.count} images to {folder.path} and {folder.write_npz()}")


def settings(sampler: ImageSampler, seed: int, batch_size: int) -> dict[str, Any]:
    """What the images of a folder are a function of, as plain values; weights by their checksums."""
    # Only where it is not the default: folders from before there was one can be continued.
    interval = {} if sampler.guidance_interval == ALL_STEPS else {"guidance_interval": [*sampler.guidance_interval]}
    way = {
        "sampler": sampler.sampler.name,
        "num_sampling_steps": sampler.sampler.steps,
        "cfg_scale": sampler.guidance_scale,
    }
    return common_settings(sampler, seed, batch_size) | way | interval


def common_settings(sampler: ImageSampler, seed: int, batch_size: int) -> dict[str, Any]:
    """The part of `settings` that is the same for all ways to sample."""
    return vae_settings(sampler.vae) | {
        "model": checksum(sampler.model),
        "amp_dtype": sampler.amp_dtype,
        "seed": seed,
        "batch_size": batch_size,
    }


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
    for start in range(rank * batch_size, folder.count, world_size * batch_size):
        # The last batch, too, is computed whole: a later run for more images continues with the same ones.
        indices = range(start, start + batch_size)
        if not (missing := folder.missing(indices)):
            continue
        images = sampler.draw_samples(seed, indices)
        for index in missing:
            folder.save(index, images[index - start])
        on_batch()
