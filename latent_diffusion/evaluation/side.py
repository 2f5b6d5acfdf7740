"""One side of a comparison: the reference or the samples, as features, as saved statistics, or as both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..images import Crop
from .extractor import Extractor
from .feature_cache import extract
from .image_set import ARRAY, ImageSet, open_images
from .metrics import Moments, moments
from .statistics import KEYS, has_statistics, read_statistics, write_statistics


@dataclass(frozen=True)
class FeatureWork:
    """How features are made of images.

    Attributes:
        cache: folder of the features that were made before.
        batch_size: images at a time.
        workers: threads that decode images.
        crop_to: side in pixels that images are brought to, and by which function; None leaves them as they are.
    """

    cache: Path
    batch_size: int = 32
    workers: int = 4
    crop_to: tuple[int, Crop] | None = None


@dataclass
class Side:
    """A set of images as the metrics see it.

    Attributes:
        name: of the set in messages and reports.
        features: float32 [N, D] by the extractor's names of outputs; none where there are statistics only.
        statistics: moments that were saved; they are taken in place of those of the features.
        count: number of images; None where saved statistics do not say.
        images: the images themselves, where there are some.
    """

    name: str
    features: Mapping[str, np.ndarray]
    count: int | None
    statistics: dict[str, Moments] = field(default_factory=dict)
    images: ImageSet | None = None

    def moments(self, output: str) -> Moments | None:
        """Mean and covariance of an output; None where neither statistics nor features have it.

        Raises:
            InputError: there are fewer than two images.
        """
        if output not in self.statistics and output in self.features:
            self.statistics[output] = moments(self.features[output])
        return self.statistics.get(output)


def side_of(name: str, features: Mapping[str, np.ndarray]) -> Side:
    """A side made of features that are in memory."""
    return Side(name, features, len(next(iter(features.values()))))


def open_side(path: Path, extractor: Extractor, work: FeatureWork) -> Side:
    """The side at `path`; makes the features of its images. All processes of a run call it.

    Args:
        path: a folder of images, an `.npz` file of images, of statistics or, as ADM's, of both.
        extractor: of the features.
        work: how they are made.

    Raises:
        InputError: whatever is wrong with the images, the statistics or the cache.
    """
    saved = read_statistics(path, extractor) if has_statistics(path) else None
    if saved is not None and not has_images(path):
        return Side(str(path), {}, saved.count, saved.moments)
    images = open_images(path, work.crop_to, work.workers)
    features = extract(images, extractor, work.cache, work.batch_size)
    return Side(str(path), features, images.count, saved.moments if saved else {}, images)


def has_images(path: Path) -> bool:
    """Whether an `.npz` file that can be read holds images."""
    with np.load(path, allow_pickle=False) as file:
        return ARRAY in file.files


def save_statistics(path: Path, extractor: Extractor, side: Side) -> None:
    """Writes a side's moments into an `.npz` that can stand for it.

    Raises:
        InputError: it has fewer than two images, or the file cannot be written.
    """
    found = {output: side.moments(output) for output in KEYS}
    known = {output: value for output, value in found.items() if value is not None}
    write_statistics(path, extractor, known, side.count)
