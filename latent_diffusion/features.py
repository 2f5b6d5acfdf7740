"""Training samples from feature files: reading one `.npy`, and the endless shuffled stream both systems train on.

Every random draw of a training sample (order, flip, dropped condition, timestep, noise) is a function of
(seed, epoch, index) alone. So a resumed run, another number of processes or of loader workers sees the same samples.
"""

import functools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import paddle

from .errors import InputError
from .files import in_order
from .npy import MAX_HEADER, MAX_ITEM, naming_damage, parse_array
from .objectives import Objective
from .reading import read_bytes

# Opening every file of ImageNet up front would take minutes on a network disk; names are all compared, and the files of
# this many images, evenly spread, are opened. The others are checked when training reads them.
IMAGES_CHECKED = 256


def read_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Reads one `.npy` file; leading axes of length 1 beyond `shape` are dropped. Nothing in the file is executed.

    Raises:
        InputError: the file is missing, cut off, no array of numbers, of another shape, or holds values that are not
            finite.
    """
    return array_of(read_content(path, shape), path, shape)


def read_content(path: Path, shape: tuple[int, ...]) -> bytes:
    """What `array_of` takes; `InputError` if it cannot be read, or is too large for an array of this shape."""
    with naming_damage(path):
        return read_bytes(path, limit=MAX_HEADER + MAX_ITEM * math.prod(shape))


def array_of(content: bytes, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """As `read_array`, of the content of the file `path`."""
    with naming_damage(path):
        array = parse_array(content)
    while array.ndim > len(shape) and array.shape[0] == 1:
        array = array[0]
    if array.shape != shape:
        raise InputError(f"the feature file {path} has shape {array.shape}, expected {shape}")
    if array.dtype.kind == "f":
        check_finite(array, path)
    return array


def read_floats(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """As `read_array`, of a file of floating-point numbers, as float32."""
    array = read_array(path, shape)
    if array.dtype.kind != "f":
        raise InputError(f"the feature file {path} holds {array.dtype}, not floating-point numbers; extract it again")
    if array.dtype.itemsize <= np.dtype(np.float32).itemsize:
        return array.astype(np.float32)
    with np.errstate(over="ignore"):  # becomes infinite
        values = array.astype(np.float32)
    check_finite(values, path)
    return values


def check_finite(values: np.ndarray, path: Path) -> None:
    """Raises `InputError` unless all values of the file `path` are finite."""
    if not np.isfinite(values).all():
        raise InputError(f"the feature file {path} holds values that are not finite; extract it again")


def array_names(folder: Path) -> Iterator[str]:
    """Names of the `.npy` files of a folder, in no order; no file is asked for its status.

    Raises:
        InputError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries if entry.name.endswith(".npy"))
    except OSError as error:
        raise InputError(f"cannot list the feature folder {folder}: {error.strerror}") from None


def list_arrays(folder: Path) -> list[str]:
    """Names of the `.npy` files of a folder in order: by number where all names are numbers, else by text.

    So the index of an image is the same in all layouts: extraction numbers the files as it lists the images.

    Raises:
        InputError: the folder is missing or holds none.
    """
    names = list(array_names(folder))
    if not names:
        raise InputError(f"the feature folder {folder} holds no .npy file")
    return in_order(names)


def images_to_check(images: int) -> np.ndarray:
    """Indices of the images, of `images`, whose files are opened before training."""
    return np.unique(np.linspace(0, images - 1, min(IMAGES_CHECKED, images), dtype=int))


class FeatureStore(ABC):
    """Features on disk, by index.

    Attributes:
        latent_shape: (C, H, W) of a latent.
    """

    latent_shape: tuple[int, int, int]

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One sample and its condition; random choices are drawn from `rng`.

        Returns:
            "latents" float32 [C, H, W], scaled; or, for the trainer to encode, "images" uint8 [H, W, 3] and
            "posterior_noise" float32 [C, h, w].
        """

    def batch(self, indices: Sequence[int], generators: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """What `sample` gives for each index and its generator, bit for bit: every value with a first axis [B]."""
        return stack([self.sample(index, rng) for index, rng in zip(indices, generators, strict=True)])


def stack(samples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The values of samples, by name, with a first axis [B]."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


class TrainingStream(paddle.io.Dataset):
    """Maps positions of the endless stream to training samples, together with what the objective draws for them.

    Position p is item `p % N` of the shuffled epoch `p // N`.
    """

    def __init__(self, store: FeatureStore, objective: Objective, seed: int):
        self.store, self.objective, self.seed = store, objective, seed

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.batch([position]).items()}

    def locate(self, position: int) -> tuple[int, int]:
        """Epoch and image number of a position."""
        epoch, offset = divmod(position, len(self.store))
        return epoch, int(_permutation(self.seed, epoch, len(self.store))[offset])

    def batch(self, positions: Sequence[int]) -> dict[str, np.ndarray]:
        """The samples at these positions, every value with a first axis [B]: they are the same in any batch."""
        indices, generators = [], []
        for position in positions:
            epoch, index = self.locate(position)
            indices.append(index)
            generators.append(np.random.default_rng([self.seed, epoch, index]))
        samples = self.store.batch(indices, generators)
        return samples | stack([self.objective.draw(rng, self.store.latent_shape) for rng in generators])


# Two epochs: a batch may reach from one into the next.
@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)
