"""COCO to features in either layout, by one process or several; after an interruption it continues."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latent_diffusion import distributed
from latent_diffusion.array_files import array_file
from latent_diffusion.configuration import VAE_DOWNSAMPLING, check_image_size
from latent_diffusion.errors import InputError
from latent_diffusion.extraction import (
    LAYOUTS,
    CaptionSource,
    Extracted,
    ImageSource,
    Work,
    batches,
    check_at_least_one,
    write_packed,
    write_records,
)
from latent_diffusion.features import read_array
from latent_diffusion.files import new_folder, preparing_folder, replace_file
from latent_diffusion.images import crop_then_resize
from latent_diffusion.packed import is_packed
from latent_diffusion.progress import progress
from latent_diffusion.records import CONTEXTS, MOMENTS, Contents, ImageContents, TextContents, image_list_sha256
from latent_diffusion.text_encoder import TextEncoder
from latent_diffusion.vae import check_downsampling, encode_moments

from .captions import CaptionedImage
from .feature_files import (
    FeatureFilesWriter,
    caption_name,
    empty_context_path,
    image_name,
    manifest_path,
    packed_folder,
    prompts_folder,
    write_prompt,
)

# How `crop_then_resize` makes images squares.
CROP = "center, Lanczos"

# Contexts of one text encoder on another device differ less than this, those of another encoder by much more.
SAME_CONTEXT = 0.05


@dataclass(frozen=True)
class ExtractionSettings:
    """How features are made; all of it shows in the manifests beside them.

    Attributes:
        vae, text_encoder, tokenizer: their names or paths.
        resolution: side of the images in pixels.
        layout: "files" or "packed".
        dtype: "float16" or "float32"; None for the layout's own (`LAYOUTS`).
    """

    vae: str
    text_encoder: str
    tokenizer: str
    resolution: int = 256
    layout: str = "files"
    dtype: str | None = None

    def __post_init__(self):
        check_image_size(self.resolution)

    def image_contents(self, vae, images: list[CaptionedImage]) -> ImageContents:
        """What is extracted of images with the `AutoencoderKL` that the settings name."""
        side = self.resolution // VAE_DOWNSAMPLING
        return ImageContents(
            content=MOMENTS,
            record_shape=(1, 2 * vae.config.latent_channels, side, side),
            dtype=self.dtype or LAYOUTS[self.layout],
            records=len(images),
            resolution=self.resolution,
            scaling_factor=float(vae.config.scaling_factor),
            vae=self.vae,
            crop=CROP,
            image_list_sha256=image_list_sha256(image.name for image in images),
        )

    def text_contents(self, encoder: TextEncoder, images: list[CaptionedImage]) -> TextContents:
        """What is extracted of captions with the text encoder that the settings name."""
        captions = [image.captions for image in images]
        return TextContents(
            content=CONTEXTS,
            record_shape=(1, 1, encoder.length, encoder.width),
            dtype=self.dtype or LAYOUTS[self.layout],
            records=sum(map(len, captions)),
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_list_sha256=hashlib.sha256(json.dumps(captions).encode()).hexdigest(),
        )


def extract_features(
    images_path: Path,
    images: list[CaptionedImage],
    features_path: Path,
    split: str,
    settings: ExtractionSettings,
    vae,
    encoder: TextEncoder,
    batch_size: int = 16,
    num_workers: int = 4,
    skip_unreadable: bool = False,
) -> tuple[Extracted, Extracted] | None:
    """Writes the features of captioned images and of the empty caption; the processes of a launched run share the work.

    Batches of one size always hold the same images or captions, and nothing is drawn. So a restarted extraction, or one
    by another number of processes, gives the same files.

    Args:
        images_path: folder of the images.
        images: of `read_captions`; they are numbered in this order.
        features_path: the folder to write; it may hold the other split.
        split: "train" or "val".
        vae, encoder: the `AutoencoderKL` and the text encoder that the settings name.
        batch_size: images, and captions, encoded at a time.
        num_workers: threads that decode images ahead of the VAE.
        skip_unreadable: first look at every image, and leave those that cannot be read out of the numbering: each is
            named on stderr, and the manifest lists them.

    Returns:
        The results of images and captions on rank 0, None on others.

    Raises:
        InputError: an image is unreadable, or the folder cannot be written or holds features of other images or
            captions, or made with other settings.
    """
    check_at_least_one(batch_size=batch_size, number_of_workers=num_workers)
    check_downsampling(vae, settings.vae, VAE_DOWNSAMPLING)
    if not images_path.is_dir():
        raise InputError(f"the folder of images {images_path} does not exist")
    _check_layout(features_path, split, settings.layout)
    _write_empty_context(features_path, encoder)
    left_out = []
    if skip_unreadable:
        source = _image_source(images_path, images, settings, num_workers, skip_unreadable=True)
        unreadable = set(_unreadable(source, batch_size))
        left_out = [str(images[i].name) for i in sorted(unreadable)]
        images = [image for i, image in enumerate(images) if i not in unreadable]
        if not images:
            raise InputError(f"none of the images of the captions file can be read from {images_path}")

    target = _Target(features_path, split, settings.layout)
    source = _image_source(images_path, images, settings, num_workers)
    of_images = _write_images(target, images, settings.image_contents(vae, images), vae, source, batch_size, left_out)
    of_captions = _write_captions(target, images, settings.text_contents(encoder, images), encoder, batch_size)
    return None if of_images is None else (of_images, of_captions)


def write_prompts(features_path: Path, prompts: list[str], encoder: TextEncoder) -> None:
    """Writes the prompts that training draws images of, in place of earlier ones."""
    with new_folder(prompts_folder(features_path), image_name(0)) as folder:
        for number, prompt in enumerate(prompts):
            write_prompt(folder / image_name(number), prompt, encoder.encode([prompt])[0])


@dataclass(frozen=True)
class _Target:
    """Where the features of a split are written."""

    features_path: Path
    split: str
    layout: str

    def write(
        self, kind: str, contents: Contents, names: Sequence[str], shape: tuple[int, ...], work: Work
    ) -> Extracted | None:
        """Writes "images" or "captions", in the layout of files under the given names and with that shape."""
        if self.layout == "packed":
            return write_packed(packed_folder(self.features_path, self.split, kind), contents, work)
        manifest = manifest_path(self.features_path, self.split, kind)
        writer = FeatureFilesWriter(self.features_path / self.split, names, shape, manifest, contents)
        return write_records(writer, work)


def _write_images(
    target: _Target,
    images: list[CaptionedImage],
    contents: ImageContents,
    vae,
    source: ImageSource,
    batch_size: int,
    left_out: list[str],
) -> Extracted | None:
    def encode(pixels: np.ndarray, numbers: range) -> np.ndarray:
        return encode_moments(vae, pixels)[:, None]

    names = [image_name(i) for i in range(len(images))]
    work = Work(source, encode, [image.id for image in images], batch_size, left_out)
    return target.write("images", contents, names, contents.record_shape[1:], work)


def _write_captions(
    target: _Target, images: list[CaptionedImage], contents: TextContents, encoder: TextEncoder, batch_size: int
) -> Extracted | None:
    def encode(captions: list[str], numbers: range) -> np.ndarray:
        return encoder.encode(captions)[:, None, None]

    owners = [(i, k) for i, image in enumerate(images) for k in range(len(image.captions))]
    names = [caption_name(i, k) for i, k in owners]
    source = CaptionSource([images[i].captions[k] for i, k in owners])
    work = Work(source, encode, [i for i, _ in owners], batch_size)
    return target.write("captions", contents, names, contents.context_shape, work)


def _check_layout(features_path: Path, split: str, layout: str) -> None:
    # The features of the first image are among the first that are written.
    of_files = (features_path / split / image_name(0)).exists()
    if layout == "packed" and of_files:
        raise InputError(f"{features_path / split} holds features in files; choose another --features-path")
    if layout == "files" and is_packed(packed_folder(features_path, split, "images")):
        raise InputError(f"{features_path / split} holds packed features; choose another --features-path")


def _image_source(
    images_path: Path,
    images: list[CaptionedImage],
    settings: ExtractionSettings,
    num_workers: int,
    skip_unreadable: bool = False,
) -> ImageSource:
    names = [image.name for image in images]
    return ImageSource(images_path, names, settings.resolution, crop_then_resize, num_workers, skip_unreadable)


def _unreadable(source: ImageSource, batch_size: int) -> list[int]:
    """Numbers of the images that cannot be read; the first process looks at all of them."""
    rank, _ = distributed.start()
    found, images = [], len(source.names)
    if rank == 0:
        with progress(images, "look", "image") as bar:
            for batch, _, readable in source.read_ahead(batches(images, batch_size)):
                found += [number for number, is_readable in zip(batch, readable, strict=True) if not is_readable]
                bar.update(len(batch))
    distributed.barrier(patience=math.inf)
    return json.loads(distributed.from_first(json.dumps(found)))


def _write_empty_context(features_path: Path, encoder: TextEncoder) -> None:
    rank, _ = distributed.start()
    if rank > 0:
        return
    path, context = empty_context_path(features_path), encoder.encode([""])[0]
    with preparing_folder(features_path):
        features_path.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        replace_file(path, lambda temporary: temporary.write_bytes(array_file(context)))
    elif np.abs(read_array(path, context.shape) - context).max() > SAME_CONTEXT:
        raise InputError(f"{path} was made by another text encoder; choose another --features-path")
