"""The cache of `--cache_latents`: images and captions encoded once, which later runs with the same settings find.

output_dir/cache/<checksum of the settings>/
    settings.json   what the checksum is of
    images/         moments of every image, in the packed layout; of the image and of its mirror with `random_flip`
    time_ids.npy    float32 [N, 6]
    captions/       contexts and pooled values of every caption, in the packed layout (`PromptContents`)
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from latent_diffusion import distributed
from latent_diffusion.configuration import VAE_DOWNSAMPLING
from latent_diffusion.errors import InputError
from latent_diffusion.extraction import (
    CaptionSource,
    Source,
    Work,
    check_at_least_one,
    read_in_threads,
    write_packed,
)
from latent_diffusion.features import images_to_check, stack
from latent_diffusion.files import preparing_folder
from latent_diffusion.packed import is_finite
from latent_diffusion.pretrained import checksum
from latent_diffusion.records import CONTEXTS, MOMENTS, ImageContents, claim_manifest
from latent_diffusion.row_files import allocate, write_rows
from latent_diffusion.vae import encode_moments

from .dataset import CaptionedImages
from .features import CAPTIONS, IMAGES, TIME_IDS_FILE, PromptContents, choose_position, read_resized
from .micro_conditioning import TIME_IDS, crop, make_time_ids, mirror
from .text_encoders import TextEncoders

SETTINGS = "settings.json"

# What to give where a VAE overflows.
SAFE_VAE = "--vae_name madebyollin/sdxl-vae-fp16-fix or --mixed_precision bf16"

# Of the checksum in the name of a folder.
DIGITS = 12


def cache_features(
    folder: Path,
    images: CaptionedImages,
    vae,
    text_encoders: TextEncoders | None,
    resolution: int,
    center_crop: bool,
    random_flip: bool,
    batch_size: int,
    num_workers: int,
    seed: int,
    dtype: str = "float32",
) -> Path:
    """Encodes images and captions, or what an interrupted run has left of them; processes of a launched run share that.

    The random crop of image i is a function of (`seed`, i) and the same in every epoch. Batches of one size always hold
    the same members, so the number of processes changes nothing.

    Args:
        folder: where caches are, one a set of settings.
        vae: an `AutoencoderKL` that downsamples by `VAE_DOWNSAMPLING`, in eval mode.
        text_encoders: None where they are trained: captions are not encoded then.
        resolution: side in pixels that images are brought to.
        center_crop: crop the middle, not a random part.
        random_flip: encode the mirrored images, too.
        batch_size: images, and captions, encoded at a time.
        num_workers: threads that decode images ahead of the VAE, at least one.
        dtype: of what is stored, "float32" or "float16".

    Returns:
        The folder of these settings, complete, on all processes: what `CachedFeatures` takes.

    Raises:
        InputError: an image is unreadable, values that come out are not finite, or the folder cannot be written.
    """
    check_at_least_one(batch_size=batch_size, number_of_workers=num_workers)
    crops = CropSource(images, resolution, center_crop, random_flip, seed, num_workers)
    settings = {
        "dataset": images.fingerprint(),
        **crops.settings(),
        "vae": checksum(vae),
        "scaling_factor": float(vae.config.scaling_factor),
        "text_encoders": text_encoders and [checksum(model) for model in text_encoders.models],
        "tokens": text_encoders and _tokens_checksum(images, text_encoders),
        "dtype": dtype,
    }
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:DIGITS]
    rank, _ = distributed.start()
    if len(set(distributed.gather(name))) > 1:
        raise InputError(
            "not all processes have the same images and models, or their copies have other times of change; give all "
            "processes the same folders"
        )
    cache = folder / name
    if rank == 0:
        with preparing_folder(cache):
            claim_manifest(cache / SETTINGS, settings)
            _allocate_time_ids(cache / TIME_IDS_FILE, len(images))
    _cache_images(cache, crops, vae, settings, batch_size)
    if text_encoders is not None:
        _cache_captions(cache / CAPTIONS, images, text_encoders, settings, batch_size)
    # The first process gives the folders their names after the others are done.
    distributed.barrier(patience=math.inf)
    return cache


def _allocate_time_ids(path: Path, count: int) -> None:
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        allocate(temporary, (count, TIME_IDS), "float32")
        temporary.rename(path)


class CropSource(Source):
    """Images as they are encoded, with their time ids; the arguments are those of `cache_features`."""

    def __init__(
        self,
        images: CaptionedImages,
        resolution: int,
        center_crop: bool,
        random_flip: bool,
        seed: int,
        num_workers: int,
    ):
        self.images, self.resolution, self.center_crop = images, resolution, center_crop
        self.views, self.seed, self.workers = 2 if random_flip else 1, seed, num_workers

    def settings(self) -> dict[str, Any]:
        """What the crops of the images are a function of."""
        return {
            "resolution": self.resolution,
            "crop": "center" if self.center_crop else "random",
            "seed": None if self.center_crop else self.seed,
            "views": self.views,
        }

    def read_ahead(self, batches: list[range]) -> Iterator[tuple[range, dict[str, np.ndarray], np.ndarray]]:
        """Yields each batch with "views" uint8 [B, V, R, R, 3] and "time_ids" float32 [B, 6]; all can be read."""
        for batch, members in read_in_threads(batches, self._read, self.workers):
            yield batch, stack(members), np.ones(len(batch), bool)

    def skipped(self, number: int) -> str:
        raise InputError(f"the image {self.images.name(number)} has no latents; run the same command again")

    def _read(self, index: int) -> dict[str, np.ndarray]:
        original, image = read_resized(self.images, index, self.resolution)
        rng = np.random.default_rng([self.seed, index])
        position = choose_position(image, self.resolution, self.center_crop, rng)
        views = [image, mirror(image)] if self.views == 2 else [image]
        return {
            "views": np.stack([crop(view, position, self.resolution) for view in views]),
            "time_ids": make_time_ids(original, position, self.resolution),
        }


def _cache_images(cache: Path, crops: CropSource, vae, settings: dict[str, Any], batch_size: int) -> None:
    side = crops.resolution // VAE_DOWNSAMPLING
    contents = ImageContents(
        content=MOMENTS,
        record_shape=(crops.views, 2 * vae.config.latent_channels, side, side),
        dtype=settings["dtype"],
        records=len(crops.images),
        resolution=crops.resolution,
        scaling_factor=settings["scaling_factor"],
        vae=settings["vae"],
        crop=settings["crop"],
        image_list_sha256=settings["dataset"],
    )

    def encode(members: dict[str, np.ndarray], numbers: range) -> np.ndarray:
        moments = np.stack([encode_moments(vae, view) for view in members["views"].swapaxes(0, 1)], axis=1)
        for number, record in zip(numbers, moments, strict=True):
            if not _is_storable(record, contents.dtype):
                raise InputError(
                    f"the VAE gives values that are not finite for the image {crops.images.name(number)}; in float16 "
                    f"SDXL's own VAE overflows: give {SAFE_VAE}"
                )
        # On the disk before the record, whose label then says that both are there.
        write_rows(cache / TIME_IDS_FILE, zip(numbers, members["time_ids"], strict=True), durable=True)
        return moments

    write_packed(cache / IMAGES, contents, Work(crops, encode, range(len(crops.images)), batch_size))


def _cache_captions(
    folder: Path, images: CaptionedImages, text_encoders: TextEncoders, settings: dict[str, Any], batch_size: int
) -> None:
    captions = [images.captions(index) for index in range(len(images))]
    texts = [text for texts in captions for text in texts]
    owners = [index for index, texts in enumerate(captions) for _ in texts]
    (length, width), pooled_width = text_encoders.context_shape, text_encoders.pooled_width
    contents = PromptContents(
        content=CONTEXTS,
        record_shape=(1, 1, 1, length * width + pooled_width),
        dtype=settings["dtype"],
        records=len(texts),
        text_encoder=" ".join(settings["text_encoders"]),
        tokenizer=settings["tokens"],
        text_list_sha256=settings["dataset"],
        tokens=length,
        pooled_width=pooled_width,
    )

    def encode(texts: list[str], numbers: range) -> np.ndarray:
        records = _encode_texts(text_encoders, texts)
        for text, record in zip(texts, records, strict=True):
            if not _is_storable(record, contents.dtype):
                raise InputError(
                    f"the text encoders give values that are not finite for the caption {text!r}; their weights are "
                    "damaged, or half precision is too coarse for them: give --mixed_precision no"
                )
        return records[:, None, None, None]

    write_packed(folder, contents, Work(CaptionSource(texts), encode, owners, batch_size))


def _encode_texts(text_encoders: TextEncoders, texts: list[str]) -> np.ndarray:
    """The contexts of each text, row by row, then its pooled values: float32 [B, L * D + P]."""
    encoded = text_encoders.encode_texts(texts)
    return paddle.concat([values.astype("float32").flatten(1) for values in encoded], axis=1).numpy()


def _tokens_checksum(images: CaptionedImages, text_encoders: TextEncoders) -> str:
    """Of the tokens of some captions: those of all would take long."""
    digest = hashlib.sha256()
    for index in images_to_check(len(images)).tolist():
        for ids in text_encoders.tokenize(images.captions(index)[0]).values():
            digest.update(ids.tobytes())
    return digest.hexdigest()


def _is_storable(values: np.ndarray, dtype: str) -> bool:
    """Whether float32 values are finite as the numbers that are stored."""
    with np.errstate(over="ignore"):  # becomes infinite
        return is_finite(values.astype(dtype))
