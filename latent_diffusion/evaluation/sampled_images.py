"""Images that are drawn when they are asked for: their features are made without a picture on disk."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import NotFiniteError
from .image_set import ImageSet


class SampledImages(ImageSet):
    """The samples 0 to `count` - 1 of a network.

    Reading ends before the first batch that is not finite: features of it and of those after it are not made.

    Args:
        path: names them in messages and in the cache of features; nothing need be there.
        count: how many.
        fingerprint: changes when the images would.
        draw: images uint8 [B, H, W, 3] of these numbers.

    Attributes:
        times: seconds an image, of each batch that this process has drawn.
    """

    def __init__(self, path: Path, count: int, fingerprint: str, draw: Callable[[Sequence[int]], np.ndarray]):
        self.path, self.count, self.fingerprint = path, count, fingerprint
        self.times: list[float] = []
        self._draw = draw

    def read_ahead(self, batches: list[range]) -> Iterator[tuple[range, np.ndarray]]:
        for batch in batches:
            start = time.monotonic()
            try:
                images = self._draw(batch)
            except NotFiniteError:
                return
            self.times.append((time.monotonic() - start) / len(batch))
            yield batch, images
