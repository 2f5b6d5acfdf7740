"""Training samples from feature files: reading one `.npy`, and the endless shuffled stream both systems train on.

Every random draw of a training sample (order, flip, dropped condition, timestep, noise) is a function of
(seed, epoch, index) alone. So a resumed run, another number of processes or of loader workers sees the same samples.
"""

import contextlib
import ctypes
import functools
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
from paddle.io.dataloader.collate import default_collate_fn

from .errors import InputError
from .files import in_order
from .objectives import Objective

# From Linux's prctl.h.
PR_SET_PDEATHSIG = 1

# Opening every file of ImageNet up front would take minutes on a network disk; names are all compared, and the files of
# this many images, evenly spread, are opened. The others are checked when training reads them.
IMAGES_CHECKED = 256


def read_array(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Reads one `.npy` file; leading axes of length 1 beyond `shape` are dropped. Nothing in the file is executed.

    Raises:
        InputError: the file is missing, truncated, no array, of another shape, or holds values that are not finite.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"the feature file {path} is missing") from None
    except Exception as error:  # a damaged header can make NumPy raise anything
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read the feature file {path} ({reason}); extract it again") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise InputError(f"the feature file {path} does not hold one array of numbers")
    if shape is not None:
        while array.ndim > len(shape) and array.shape[0] == 1:
            array = array[0]
        if array.shape != shape:
            raise InputError(f"the feature file {path} has shape {array.shape}, expected {shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"the feature file {path} holds values that are not finite; extract it again")
    return array


def array_names(folder: Path) -> list[str]:
    """Names of the `.npy` files of a folder, in no order; no file is asked for its status.

    Raises:
        InputError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.name.endswith(".npy")]
    except OSError as error:
        raise InputError(f"cannot list the feature folder {folder}: {error.strerror}") from None


def list_arrays(folder: Path) -> list[str]:
    """Names of the `.npy` files of a folder in order: by number where all names are numbers, else by text.

    So the index of an image is the same in all layouts: extraction numbers the files as it lists the images.

    Raises:
        InputError: the folder is missing or holds none.
    """
    names = array_names(folder)
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


class TrainingStream(paddle.io.Dataset):
    """Maps a position of the endless stream to a training sample, together with what the objective draws for it.

    Position p is item `p % N` of the shuffled epoch `p // N`.
    """

    def __init__(self, store: FeatureStore, objective: Objective, seed: int):
        self.store, self.objective, self.seed = store, objective, seed

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        epoch, offset = divmod(position, len(self.store))
        index = int(_permutation(self.seed, epoch, len(self.store))[offset])
        rng = np.random.default_rng([self.seed, epoch, index])
        sample = self.store.sample(index, rng)
        return sample | self.objective.draw(rng, self.store.latent_shape)


# Two epochs: a batch may reach from one into the next.
@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


class StreamBatchSampler(paddle.io.BatchSampler):
    """Positions of one process's batches `first` to `last - 1`.

    Batch b of all processes together covers positions `[b * world_size * batch_size, ...)`, rank by rank: the union
    does not depend on how many processes share it.
    """

    def __init__(self, batch_size: int, first: int, last: int, rank: int = 0, world_size: int = 1):
        self.batch_size, self.first, self.last = batch_size, first, last
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return max(self.last - self.first, 0)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.first, self.last):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


class TrainingLoader(paddle.io.DataLoader):
    """Batches of a stream; an `InputError` met while one is read is raised to the caller as it is.

    Paddle would print it as the traceback of a thread and give the caller an error of a queue.
    """

    def __init__(self, stream: paddle.io.Dataset, batch_sampler: StreamBatchSampler, num_workers: int = 0):
        super().__init__(
            _ErrorsAsSamples(stream),
            batch_sampler=batch_sampler,
            collate_fn=_collate,
            num_workers=num_workers,
            worker_init_fn=_die_with_parent,
        )

    def __iter__(self) -> Iterator[dict[str, paddle.Tensor]]:
        for batch in super().__iter__():
            if _ERROR in batch:
                raise InputError(batch[_ERROR].numpy().tobytes().decode())
            yield batch


_ERROR = "error"


class _ErrorsAsSamples(paddle.io.Dataset):
    def __init__(self, stream: paddle.io.Dataset):
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, position: int) -> dict[str, np.ndarray] | InputError:
        try:
            return self.stream[position]
        except InputError as error:
            return error


def _die_with_parent(worker: int) -> None:
    """Lets the kernel end a worker with the process that started it: a killed run would leave its workers behind."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _collate(samples: list[dict[str, np.ndarray] | InputError]) -> dict[str, np.ndarray]:
    for sample in samples:
        if isinstance(sample, InputError):
            return {_ERROR: np.frombuffer(str(sample).encode(), dtype=np.uint8)}
    return default_collate_fn(samples)
