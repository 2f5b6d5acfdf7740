"""What an extractor of features is; `extractors.py` makes them by name."""

from abc import ABC, abstractmethod

import numpy as np


class Extractor(ABC):
    """Makes features of images, of which the metrics are computed.

    Attributes:
        name: by which a user asks for it.
        identity: the name with what its results depend on (weights, by a checksum), as a short text: features and
            statistics with equal identities can be compared.
        widths: of each output, by its name. Every extractor has "features", from which distances between sets are
            computed. There may be "spatial" (for sFID) and "logits" (for the Inception Score).
    """

    name: str
    identity: str
    widths: dict[str, int]

    @abstractmethod
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of images uint8 [B, H, W, 3]: float32 [B, width] for each name of `widths`.

        Raises:
            InputError: images of this size cannot be taken.
        """
