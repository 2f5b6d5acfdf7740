"""Images to features in either layout, by one process or several; after an interruption it continues."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latent_diffusion import distributed
from latent_diffusion.errors import InputError
from latent_diffusion.files import preparing_folder, publish_folder
from latent_diffusion.images import list_image_folder, read_image
from latent_diffusion.packed import MANIFEST, PackedReader, PackedWriter, is_packed
from latent_diffusion.progress import progress
from latent_diffusion.records import (
    CROP,
    LATENTS,
    MOMENTS,
    Contents,
    RecordWriter,
    claim_manifest,
    image_list_sha256,
)
from latent_diffusion.vae import check_downsampling, encode_moments, sample_moments

from .configuration import VAE_DOWNSAMPLING
from .feature_files import FeatureFilesWriter

LAYOUTS = {"files": "float32", "packed": "float16"}

# Batches whose images are being decoded while one is encoded.
BATCHES_AHEAD = 2


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
        if self.resolution < 1 or self.resolution % VAE_DOWNSAMPLING:
            raise InputError(f"the image size {self.resolution} is not a positive multiple of {VAE_DOWNSAMPLING}")
        if self.seed < 0:
            raise InputError(f"the seed must be at least 0, not {self.seed}")

    def contents(self, vae, images: list[Path], classes: list[str]) -> Contents:
        """What is extracted of images with the `AutoencoderKL` that the settings name; their paths are relative."""
        packed, side = self.layout == "packed", self.resolution // VAE_DOWNSAMPLING
        channels = vae.config.latent_channels
        views = 2 if packed or self.flip else 1
        return Contents(
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


@dataclass(frozen=True)
class Extracted:
    """How an extraction ended: images in the folder, those of them encoded now, and paths that were skipped."""

    images: int
    encoded: int
    skipped: list[str]


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
    for name, value in (("batch size", batch_size), ("number of workers", num_workers)):
        if value < 1:
            raise InputError(f"the {name} must be at least 1, not {value}")
    paths, labels, classes = list_image_folder(data_path)
    check_downsampling(vae, settings.vae, VAE_DOWNSAMPLING)
    names = [path.relative_to(data_path) for path in paths]
    contents = settings.contents(vae, names, classes)
    rank, world_size = distributed.start()
    if settings.layout == "packed" and is_packed(features_path):
        return _finished(features_path, contents) if rank == 0 else None
    writer = _writer(settings.layout, features_path, contents)
    if rank == 0:
        with preparing_folder(writer.folder):
            writer.claim()
    distributed.barrier()
    absent = set(writer.absent())
    distributed.barrier()  # nobody writes before everybody has looked

    starts = range(0, len(paths), batch_size)[rank::world_size]
    batches = [range(start, min(start + batch_size, len(paths))) for start in starts]
    images = _ImageReader(paths, settings.resolution, skip_unreadable)
    encode = _encoder(vae, contents)
    share = "" if world_size == 1 else f" (share of one process of {world_size})"
    pending = [batch for batch in batches if not absent.isdisjoint(batch)]
    with progress(sum(map(len, pending)), f"extract{share}", "image") as bar:
        for batch, pixels, readable in images.read_ahead(pending, num_workers):
            records = encode(pixels, batch)
            kept = [i for i, found in zip(batch, readable, strict=True) if found]
            writer.write(kept, records[readable], [labels[i] for i in kept])
            bar.update(len(batch))

    # After a restart one process may have hours of work left and another none.
    distributed.barrier(patience=math.inf)
    if rank > 0:
        return None
    unread = writer.absent()
    for i in unread:
        images.check_unreadable(i)
    skipped = [str(names[i]) for i in unread]
    writer.finish(skipped)
    if settings.layout == "packed":
        publish_folder(writer.folder, features_path.absolute())
    return Extracted(len(paths) - len(skipped), len(absent) - len(skipped), skipped)


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


def _writer(layout: str, features_path: Path, contents: Contents) -> RecordWriter:
    if layout == "files":
        if is_packed(features_path):
            raise InputError(f"{features_path} holds packed features; choose another --features-path")
        return FeatureFilesWriter(features_path, contents)
    if features_path.exists() and (not features_path.is_dir() or any(features_path.iterdir())):
        raise InputError(f"{features_path} exists and holds no packed features; choose another --features-path")
    return PackedWriter(features_path.absolute().with_name(f"{features_path.name}.partial"), contents)


def _finished(features_path: Path, contents: Contents) -> Extracted:
    claim_manifest(features_path / MANIFEST, contents.to_dict())
    skipped = PackedReader(features_path).skipped
    return Extracted(contents.records - len(skipped), 0, skipped)


def _encoder(vae, contents: Contents) -> Callable[[np.ndarray, range], np.ndarray]:
    """A function of images uint8 [B, H, W, 3] and their numbers that gives their records [B, V, C, H, W]."""

    def encode(pixels: np.ndarray, numbers: range) -> np.ndarray:
        views = [pixels, pixels[:, :, ::-1]][: contents.views]
        moments = np.stack([encode_moments(vae, view) for view in views], axis=1)
        if contents.content == MOMENTS:
            return moments
        return sample_latents(moments, numbers, contents.seed, contents.scaling_factor)

    return encode


class _ImageReader:
    """Reads the images of a list, ahead of their use; unreadable ones stop it or are skipped."""

    def __init__(self, paths: list[Path], resolution: int, skip_unreadable: bool):
        self.paths, self.resolution, self.skip_unreadable = paths, resolution, skip_unreadable

    def read_ahead(self, batches: list[range], workers: int) -> Iterator[tuple[range, np.ndarray, np.ndarray]]:
        """Yields each batch with its images uint8 [B, H, W, 3], and which of them could be read: bool [B].

        A skipped image is black, so that the batch has its size: results could depend on that in their last digits.
        """
        with ThreadPoolExecutor(workers) as pool:
            reading = deque()
            for batch in batches:
                reading.append((batch, [pool.submit(self._read, i) for i in batch]))
                if len(reading) > BATCHES_AHEAD:
                    yield self._batch(*reading.popleft())
            while reading:
                yield self._batch(*reading.popleft())

    def check_unreadable(self, i: int) -> None:
        """Raises `InputError` if image i can be read: then its features were lost, not skipped."""
        if isinstance(self._read(i), np.ndarray):
            raise InputError(f"{self.paths[i]} can be read but has no features; run the same command again")

    def _read(self, i: int) -> np.ndarray | InputError:
        try:
            return read_image(self.paths[i], self.resolution)
        except InputError as error:
            if self.skip_unreadable:
                return error
            raise

    def _batch(self, batch: range, reading: list) -> tuple[range, np.ndarray, np.ndarray]:
        found = [future.result() for future in reading]
        for error in found:
            if isinstance(error, InputError):
                print(f"skipped: {error}", file=sys.stderr, flush=True)
        readable = np.array([isinstance(image, np.ndarray) for image in found])
        black = np.zeros((self.resolution, self.resolution, 3), np.uint8)
        images = np.stack([image if isinstance(image, np.ndarray) else black for image in found])
        return batch, images, readable
