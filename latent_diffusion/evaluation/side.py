"""One side of a comparison: the reference or the samples, as features, as saved statistics, or as both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..images import Crop
from .extractor import Extractor
from .feature_cache import extract
from .image_set import ARRAY, ImageSet, open_images
from .metrics import Moments, moments
from .npz import array_names
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
        features: float32 [N, D] by the extractor's names of outputs; none where there are statistics only, and none
            before `extract`.
        saved: moments that were saved; they are taken in place of those of the features.
        saved_count: of how many images they are; None where that is not known.
        images: the images themselves, where there are some.
        fingerprint: a short text that changes with the images and the statistics.
    """

    name: str
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    saved: dict[str, Moments] = field(default_factory=dict)
    saved_count: int | None = None
    images: ImageSet | None = None
    fingerprint: str = ""
    make_features: Callable[[], Mapping[str, np.ndarray]] = dict
    _moments: dict[str, Moments] = field(default_factory=dict)

    def extract(self) -> "Side":
        """Makes the features of the images, if there are any; all processes of a run call it together.

        Raises:
            InputError: whatever is wrong with the images or the cache.
        """
        if self.images is not None:
            self.features = self.make_features()
        return self

    @property
    def count(self) -> int | None:
        """Number of images that are there; None where there are statistics only."""
        return self.images.count if self.images else len(next(iter(self.features.values()), [])) or None

    @property
    def moments_count(self) -> int | None:
        """Number of images that the moments are of; None where that is not known."""
        return self.saved_count if self.saved else self.count

    def moments(self, output: str) -> Moments | None:
        """Mean and covariance of an output; None where neither statistics nor features have it.

        Raises:
            InputError: there are fewer than two images.
        """
        if output in self.saved:
            return self.saved[output]
        if output not in self._moments and output in self.features:
            self._moments[output] = moments(self.features[output], f"the images of {self.name}")
        return self._moments.get(output)


def open_side(path: Path, extractor: Extractor, work: FeatureWork) -> Side:
    """The side at `path`, without the features of its images: those are made by its `extract`.

    Args:
        path: a folder of images, an `.npz` file of images, of statistics or, as ADM's, of both.
        extractor: of the features.
        work: how they are made.

    Raises:
        InputError: whatever is wrong with the images or the statistics.
    """
    side = Side(str(path))
    if has_statistics(path):
        statistics = read_statistics(path, extractor)
        side.saved, side.saved_count, side.fingerprint = statistics.moments, statistics.count, statistics.fingerprint
        if ARRAY not in array_names(path):
            return side
    images = open_images(path, work.crop_to, work.workers)
    side.images, side.fingerprint = images, f"{side.fingerprint}{images.fingerprint}"
    side.make_features = lambda: extract(images, extractor, work.cache, work.batch_size)
    return side


def save_statistics(path: Path, extractor: Extractor, side: Side) -> None:
    """Writes a side's moments into an `.npz` that can stand for it.

    Raises:
        InputError: it has fewer than two images, or the file cannot be written.
    """
    found = {output: side.moments(output) for output in KEYS}
    known = {output: value for output, value in found.items() if value is not None}
    write_statistics(path, extractor, known, side.moments_count)
