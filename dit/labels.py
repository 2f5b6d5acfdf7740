"""Class labels in training."""

import numpy as np

from .configuration import DiTConfig


def draw_label(label: int, config: DiTConfig, rng: np.random.Generator) -> np.int64:
    """The label, or the null class with probability `class_dropout_prob` (for guidance: arXiv 2207.12598)."""
    return np.int64(config.num_classes if rng.random() < config.class_dropout_prob else label)
