"""What sampling has in common: noise that depends on (seed, index) alone, and a network at rest."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import paddle

from .errors import InputError


def sample_generators(seed: int, indices: Iterable[int]) -> list[np.random.Generator]:
    """A generator for each sample, a function of (seed, index): what a sample is does not depend on its neighbors.

    Args:
        seed: at least 0.
        indices: the samples' numbers, each at least 0.

    Raises:
        InputError: the seed is negative.
    """
    if seed < 0:
        raise InputError(f"the seed must be at least 0, not {seed}")
    return [np.random.default_rng([seed, index]) for index in indices]


def draw_noise(generators: Sequence[np.random.Generator], shape: tuple[int, ...]) -> paddle.Tensor:
    """Standard normal noise, float32 [B, *shape]: one sample of each generator."""
    return paddle.to_tensor(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in generators]))


@contextlib.contextmanager
def evaluating(model: paddle.nn.Layer) -> Iterator[None]:
    """Puts a network into eval mode, and afterwards into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
