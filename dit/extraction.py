"""Images to features in either layout, by one process or several; after an interruption it continues."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latent_diffusion.configuration import VAE_DOWNSAMPLING, check_image_size
from latent_diffusion.errors import InputError
from latent_diffusion.extraction import (
    LAYOUTS,
    Extracted,
    ImageSource,
    Work,
    check_at_least_one,
    write_packed,
    write_records,
)
from latent_diffusion.images import center_crop, list_image_folder
from latent_diffusion.packed import is_packed
from latent_diffusion.records import LATENTS, MOMENTS, ImageContents, image_list_sha256
from latent_diffusion.vae import check_downsampling, encode_moments, sample_moments

from .feature_files import FeatureFilesWriter

# How `center_crop` makes images squares.
CROP = "center, ADM"


@dataclass(frozen=True)
class ExtractionSettings:
    """How features are made; all of it shows in the manifest beside them.

    Attributes:
        vae: name or path of the VAE.
        resolution: side of the images in pixels.
        layout: "files" (samples of the posterior, scaled) or "packed" (moments of the image and of its mirror).
        dtype: "float16" or "float32"; None for the layout's own (`LAYOUTS`).
        flip: whether mirrored latents are written too; packed features always have them.
        seed: of the posterior samples.
    """

    vae: str
    resolution: int
    layout: str = "files"
    dtype: str | None = None
    flip: bool = False
    seed: int = 0

    def __post_init__(self):
        check_image_size(self.resolution)
        if self.seed < 0:
            raise InputError(f"the seed must be at least 0, not {self.seed}")

    def contents(self, vae, images: list[Path], classes: list[str]) -> ImageContents:
        """What is extracted of images with the `AutoencoderKL` that the settings name; their paths are relative."""
        packed, side = self.layout == "packed", self.resolution // VAE_DOWNSAMPLING
        channels = vae.config.latent_channels
        views = 2 if packed or self.flip else 1
        return ImageContents(
            content=MOMENTS if packed else LATENTS,
            record_shape=(views, 2 * channels if packed else channels, side, side),
            dtype=self.dtype or LAYOUTS[self.layout],
            records=len(images),
            resolution=self.resolution,
            scaling_factor=float(vae.config.scaling_factor),
            vae=self.vae,
            crop=CROP,
            seed=None if packed else self.seed,
            classes=tuple(classes),
            image_list_sha256=image_list_sha256(images),
        )


def extract_features(
    data_path: Path,
    features_path: Path,
    settings: ExtractionSettings,
    vae,
    batch_size: int = 16,
    num_workers: int = 4,
    skip_unreadable: bool = False,
) -> Extracted | None:
    """Writes the features of every image of an image folder; the processes of a launched run share the batches.

    Batches of one size always hold the same images, in the order of `list_image_folder`, and the noise of image i
    depends on (seed, i) alone. So a restarted extraction, or one by another number of processes, gives the same files.
    Packed features are in `<features_path>.partial` until they are complete.

    Args:
        data_path: one folder a class.
        features_path: the folder to write.
        vae: the `AutoencoderKL` that the settings name, in eval mode.
        batch_size: images encoded at a time.
        num_workers: threads that decode images ahead of the VAE.
        skip_unreadable: skip images that cannot be read: each is named on stderr, and the manifest lists them.

    Returns:
        The result on rank 0, None on others.

    Raises:
        InputError: an image is unreadable, or the folder cannot be written or holds features of other images or made
            with other settings.
    """
    check_at_least_one(batch_size=batch_size, number_of_workers=num_workers)
    paths, labels, classes = list_image_folder(data_path)
    check_downsampling(vae, settings.vae, VAE_DOWNSAMPLING)
    names = [path.relative_to(data_path) for path in paths]
    contents = settings.contents(vae, names, classes)
    images = ImageSource(data_path, names, settings.resolution, center_crop, num_workers, skip_unreadable)
    work = Work(images, _encoder(vae, contents), labels, batch_size)
    if settings.layout == "packed":
        return write_packed(features_path, contents, work)
    if is_packed(features_path):
        raise InputError(f"{features_path} holds packed features; choose another --features-path")
    return write_records(FeatureFilesWriter(features_path, contents), work)


def sample_latents(moments: np.ndarray, numbers: Iterable[int], seed: int, scaling_factor: float) -> np.ndarray:
    """Scaled samples of posteriors; the noise of image i is a function of (seed, i), the same for its mirror.

    Args:
        moments: float [B, V, 2 C, H, W].
        numbers: the images' numbers i.

    Returns:
        float32 [B, V, C, H, W].
    """
    shape = (1, moments.shape[2] // 2, *moments.shape[3:])
    noise = [np.random.default_rng([seed, i]).standard_normal(shape, dtype=np.float32) for i in numbers]
    return sample_moments(moments, np.stack(noise)) * np.float32(scaling_factor)


def _encoder(vae, contents: ImageContents) -> Callable[[np.ndarray, range], np.ndarray]:
    """A function of images uint8 [B, H, W, 3] and their numbers that gives their records [B, V, C, H, W]."""

    def encode(pixels: np.ndarray, numbers: range) -> np.ndarray:
        views = [pixels, pixels[:, :, ::-1]][: contents.views]
        moments = np.stack([encode_moments(vae, view) for view in views], axis=1)
        if contents.content == MOMENTS:
            return moments
        return sample_latents(moments, numbers, contents.seed, contents.scaling_factor)

    return encode
