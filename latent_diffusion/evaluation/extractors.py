"""Extractors of features by name."""

from pathlib import Path

import numpy as np

from ..command_line import ArgumentParser
from ..errors import InputError
from .extractor import Extractor

EXTRACTORS = ("inception", "dinov2", "pixels", "digits-classifier")

# Pixels of a side that an image is averaged down to, for the extractors that need no weights.
GRID = 8


def add_extractor_arguments(parser: ArgumentParser) -> None:
    """Adds `--extractor` and `--weights`."""
    add = parser.add_argument
    add(
        "--extractor",
        choices=EXTRACTORS,
        default=EXTRACTORS[0],
        help="features: inception (FID), dinov2 (FD-DINOv2); without weights, for small demonstrations: pixels, "
        "digits-classifier",
    )
    add("--weights", type=Path, help="weights of the extractor; without it they are looked for in pretrained_models")


def make_extractor(name: str, weights: Path | None = None) -> Extractor:
    """The extractor of one of the names `EXTRACTORS`.

    Args:
        name: which one.
        weights: its weights; None looks in the usual places, or where it needs none.

    Raises:
        InputError: no such extractor, weights that are not there or not its own, or weights where it has none.
    """
    if name == "inception":
        from .inception import load_inception

        return load_inception(weights)
    if name == "dinov2":
        from .dinov2 import load_dinov2

        return load_dinov2(weights)
    if name not in EXTRACTORS:
        raise InputError(f"unknown extractor {name!r}; known are {', '.join(EXTRACTORS)}")
    if weights is not None:
        raise InputError(f"the extractor {name} has no weights; leave out {weights}")
    if name == "pixels":
        return Pixels()
    from .digits_classifier import DigitsClassifier

    return DigitsClassifier()


class Pixels(Extractor):
    """The image itself, averaged to 8x8 pixels, values in [0, 1]: for tests of a setup, not for papers."""

    name = identity = "pixels"
    widths = {"features": GRID * GRID * 3}

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": grid_average(images).reshape(len(images), -1).astype(np.float32) / 255}


def grid_average(images: np.ndarray) -> np.ndarray:
    """Averages images uint8 [N, H, W, C] over a grid of boxes: float64 [N, 8, 8, C], values in [0, 255].

    Raises:
        InputError: a side has fewer than 8 pixels.
    """
    sums = images.astype(np.float64)
    for axis, pixels in ((1, images.shape[1]), (2, images.shape[2])):
        if pixels < GRID:
            raise InputError(f"images of {images.shape[2]}x{images.shape[1]} pixels are too small; {GRID} are needed")
        edges = np.arange(GRID + 1) * pixels // GRID
        shape = [1, 1, 1, 1]
        shape[axis] = GRID
        sums = np.add.reduceat(sums, edges[:-1], axis) / np.diff(edges).reshape(shape)
    return sums
