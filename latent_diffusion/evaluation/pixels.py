"""Features that need no network: what an image looks like from afar."""

import numpy as np

from ..errors import InputError
from .extractor import Extractor

# Pixels of a side that an image is averaged down to.
GRID = 8


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
