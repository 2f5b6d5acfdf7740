"""Features from one layout to the other."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from latent_diffusion.errors import InputError
from latent_diffusion.files import new_folder
from latent_diffusion.packed import MANIFEST, PackedReader, PackedWriter, is_packed
from latent_diffusion.progress import progress
from latent_diffusion.records import LATENTS, MOMENTS, ImageContents, RecordReader

from .extraction import sample_latents
from .feature_files import FeatureFilesReader, FeatureFilesWriter, manifest_path

# Records that are flushed to the disk together.
BATCH = 256


@dataclass(frozen=True)
class Converted:
    """What was read, what was written, and of how many images."""

    read: ImageContents
    written: ImageContents
    images: int


def convert_features(
    source: Path, target: Path, layout: str, scaling_factor: float | None = None, seed: int = 0
) -> Converted:
    """Writes the features of `source` in the other layout; the checksums that `source` has are verified.

    Latents are copied bit for bit. Moments become one scaled sample of the posterior for an image and its mirror, drawn
    as extraction draws it: the noise of image i is a function of (seed, i).

    Args:
        source: a feature folder in either layout.
        target: the folder to make.
        layout: "packed" or "files", the one that `source` is not in.
        scaling_factor: what the latents were multiplied by, where `source` has no manifest that says so.
        seed: of the posterior samples.

    Raises:
        InputError: `source` is damaged or in that layout already, or `target` exists; nothing is left of `target` then.
    """
    if seed < 0:
        raise InputError(f"the seed must be at least 0, not {seed}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists; choose another folder to write, or remove it")
    if is_packed(source) == (layout == "packed"):
        raise InputError(f"the features in {source} are not in the other layout: {layout!r} is what is to be written")
    reader = PackedReader(source) if is_packed(source) else FeatureFilesReader(source, scaling_factor)
    contents = _sampled(reader.contents, seed) if layout == "files" else reader.contents
    marker = MANIFEST if layout == "packed" else manifest_path(target, contents.resolution).name
    with new_folder(target, marker) as folder:
        writer = (PackedWriter if layout == "packed" else FeatureFilesWriter)(folder, contents)
        writer.claim()
        images = contents.records - len(reader.skipped)
        with progress(images, "convert", "image") as bar:
            for numbers, records, labels in _batches(reader):
                if reader.contents.content != contents.content:
                    records = sample_latents(records, numbers, seed, contents.scaling_factor)
                writer.write(numbers, records, labels)
                bar.update(len(numbers))
        writer.finish(reader.skipped)
        os.sync()  # all at once: the folder's files are flushed one by one next, which takes much longer
    return Converted(reader.contents, contents, images)


def _sampled(contents: ImageContents, seed: int) -> ImageContents:
    if contents.content != MOMENTS:
        return contents
    shape = (contents.views, *contents.latent_shape)
    return replace(contents, content=LATENTS, record_shape=shape, seed=seed)


def _batches(reader: RecordReader) -> Iterator[tuple[list[int], np.ndarray, list[int]]]:
    records = iter(reader)
    while batch := list(itertools.islice(records, BATCH)):
        numbers, arrays, labels = zip(*batch, strict=True)
        yield list(numbers), np.stack(arrays), list(labels)
