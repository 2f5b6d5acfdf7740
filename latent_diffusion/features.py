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
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import paddle

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

    def batch(self, positions: Sequence[int]) -> dict[str, np.ndarray]:
        """The samples at these positions, every value with a first axis [B]: they are the same in any batch."""
        indices, generators = [], []
        for position in positions:
            epoch, offset = divmod(position, len(self.store))
            index = int(_permutation(self.seed, epoch, len(self.store))[offset])
            indices.append(index)
            generators.append(np.random.default_rng([self.seed, epoch, index]))
        samples = self.store.batch(indices, generators)
        return samples | stack([self.objective.draw(rng, self.store.latent_shape) for rng in generators])


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

    def __init__(self, stream: TrainingStream, batch_sampler: StreamBatchSampler, num_workers: int = 0):
        super().__init__(
            _Positions(stream),
            batch_sampler=batch_sampler,
            # Batches are read as a whole, which is faster than sample by sample.
            collate_fn=functools.partial(_read, stream),
            num_workers=num_workers,
            worker_init_fn=_die_with_parent,
        )

    def __iter__(self) -> Iterator[dict[str, paddle.Tensor]]:
        # Without workers Paddle would read in a thread, beside which no process can be forked safely: it may hold a
        # lock of Paddle's allocator, which then stays locked in the new process.
        batches = super().__iter__() if self.num_workers else map(self._read_here, self.batch_sampler)
        for batch in batches:
            if _ERROR in batch:
                raise InputError(batch[_ERROR].numpy().tobytes().decode())
            yield batch

    def _read_here(self, positions: Sequence[int]) -> dict[str, paddle.Tensor]:
        return {name: paddle.to_tensor(values) for name, values in self.collate_fn(positions).items()}


_ERROR = "error"


class _Positions(paddle.io.Dataset):
    """Gives every position itself."""

    def __init__(self, stream: TrainingStream):
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, position: int) -> int:
        return position


def _die_with_parent(worker: int) -> None:
    """Lets the kernel end a worker with the process that started it: a killed run would leave its workers behind."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _read(stream: TrainingStream, positions: Sequence[int]) -> dict[str, np.ndarray]:
    """The batch at these positions, or as an array under `_ERROR` what keeps it from being read."""
    try:
        return stream.batch(positions)
    except InputError as error:
        return {_ERROR: np.frombuffer(str(error).encode(), dtype=np.uint8)}
