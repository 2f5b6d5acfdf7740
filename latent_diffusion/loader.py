"""Batches of the training stream, read ahead by worker processes.

Worker w of W reads batches w, w + W, ... and writes each into a socket of its own, where it blocks until the training
process takes it: nothing is asked of a worker, so neither side can wait for the other in a circle. The training process
takes the batches in order, in the calling thread.

Workers are forked from a process that runs Paddle, and another thread may hold one of Paddle's locks at that moment. So
they touch nothing of Paddle, not even to free it, and the training process starts no thread for them.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import itertools
import json
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import paddle

from .errors import InputError
from .features import TrainingStream
from .stopping import PR_SET_PDEATHSIG

# Seconds without a byte from a worker that is waited for, after which its disk is taken to hang.
ANSWER_LIMIT = 600.0

# Seconds in which a killed process ends, unless it is stuck in the kernel.
STOP_LIMIT = 5.0

# A run that is to stop still finishes its step, for which it needs its workers.
NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM)

_BATCH, _INPUT_ERROR, _BUG = "batch", "input error", "bug"


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
    """Batches of a stream as tensors on the current place, the same with any number of workers.

    Workers start with an iteration and end with it, however it ends. Paddle's class, which PaddleNLP's Trainer asks
    for, gives the attributes and the length.

    Args:
        num_workers: processes that read ahead; with 0 the calling thread reads. Other systems than Linux have none.

    Raises, while it is iterated over:
        InputError: a batch cannot be read; or a worker cannot be started, has died or does not answer.
        RuntimeError: a worker met any other exception, whose traceback this has.
    """

    def __init__(self, stream: TrainingStream, batch_sampler: StreamBatchSampler, num_workers: int = 0):
        super().__init__(stream, batch_sampler=batch_sampler, num_workers=num_workers)

    def __iter__(self) -> Iterator[dict[str, paddle.Tensor]]:
        if self.num_workers == 0:
            yield from map(_tensors, map(self.dataset.batch, self.batch_sampler))
            return
        batches = len(self.batch_sampler)
        with _running(self.dataset, self.batch_sampler, min(self.num_workers, batches)) as workers:
            for batch in range(batches):
                yield _tensors(workers[batch % len(workers)].receive())


def _tensors(batch: dict[str, np.ndarray]) -> dict[str, paddle.Tensor]:
    return {name: _tensor(values) for name, values in batch.items()}


def _tensor(values: np.ndarray) -> paddle.Tensor:
    """A copy of an array as a tensor on the current place."""
    if paddle.get_device() != "cpu":
        return paddle.to_tensor(values)
    # Of each call Paddle's own function keeps 100 bytes for good, half a gigabyte in a million steps.
    tensor, values = paddle.empty(values.shape, values.dtype.name), np.ascontiguousarray(values)
    ctypes.memmove(tensor.data_ptr(), values.ctypes.data, values.nbytes)
    return tensor


class _Worker:
    """A process that reads every `count`-th batch, beginning with its `number`, and our end of the socket between us.

    Attributes:
        process: the process, started.
    """

    def __init__(self, number: int, count: int, stream: TrainingStream, batches: Iterable[Sequence[int]]):
        self.name = f"loader worker {number + 1} of {count}"
        self._socket, answers = socket.socketpair()
        self._socket.settimeout(ANSWER_LIMIT)
        self._received = self._socket.makefile("rb")
        own_batches = itertools.islice(batches, number, None, count)
        # Looked up here: the loader of libraries has a lock, too.
        die_with_parent = functools.partial(_die_with_parent, ctypes.CDLL(None).prctl, os.getpid())
        self.process = multiprocessing.get_context("fork").Process(
            target=_work, args=(stream, own_batches, answers, die_with_parent), daemon=True
        )
        # Its copy is then the only one, so that its death is the end of what can be received.
        with answers:
            self.process.start()

    def receive(self) -> dict[str, np.ndarray]:
        """The worker's next batch.

        Raises:
            InputError: the batch cannot be read, or the worker died or does not answer.
            RuntimeError: any other exception in the worker.
        """
        try:
            return self._receive()
        except TimeoutError:
            raise InputError(
                f"{self.name} has not answered for {ANSWER_LIMIT:g} s; check the disk that it reads from, "
                "then continue from the last checkpoint"
            ) from None
        except (EOFError, ConnectionError):
            raise self._died() from None

    def _receive(self) -> dict[str, np.ndarray]:
        line = self._received.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        kind, content = json.loads(line)
        if kind == _INPUT_ERROR:
            raise InputError(content)
        if kind == _BUG:
            raise RuntimeError(f"{self.name} failed:\n{content}")
        return {name: self._receive_array(dtype, shape) for name, dtype, shape in content}

    def _receive_array(self, dtype: str, shape: list[int]) -> np.ndarray:
        array = np.empty(shape, dtype)
        if self._received.readinto(array) < array.nbytes:
            raise EOFError
        return array

    def _died(self) -> InputError:
        self.process.join(STOP_LIMIT)
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
        return InputError(
            f"{self.name} {how}; the usual cause is lack of memory: use fewer workers (--num_workers, "
            "--dataloader_num_workers) and continue from the last checkpoint"
        )

    def end(self) -> None:
        """Leaves nothing of a killed worker."""
        self._received.close()
        self._socket.close()
        self.process.join(STOP_LIMIT)
        if self.process.exitcode is not None:
            self.process.close()


@contextlib.contextmanager
def _running(stream: TrainingStream, batches: Iterable[Sequence[int]], count: int) -> Iterator[list[_Worker]]:
    """`count` workers, which end with the block or with Python."""
    workers: list[_Worker] = []
    stop = functools.partial(_stop, workers)
    try:
        with _forking():
            for number in range(count):
                workers.append(_start(number, count, stream, batches))
        # A traceback may hold an unfinished iteration until Python ends, and then multiprocessing would send SIGTERM to
        # the workers, which they do not get, and wait for them.
        atexit.register(stop)
        yield workers
    finally:
        atexit.unregister(stop)
        stop()


def _start(number: int, count: int, *rest) -> _Worker:
    try:
        return _Worker(number, count, *rest)
    except OSError as error:
        raise InputError(
            f"cannot start loader worker {number + 1} of {count} ({error.strerror}); use fewer workers "
            "(--num_workers, --dataloader_num_workers)"
        ) from None


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
    while workers:
        workers.pop().end()


@contextlib.contextmanager
def _forking() -> Iterator[None]:
    """Workers forked in this block never get the signals that ask a run to stop, nor collect garbage of Paddle's."""
    gc.freeze()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        gc.unfreeze()


def _work(
    stream: TrainingStream,
    batches: Iterable[Sequence[int]],
    answers: socket.socket,
    die_with_parent: Callable[[], None],
) -> None:
    """What a worker does: it sends its batches."""
    die_with_parent()
    for positions in batches:
        kind, content, arrays = _answer(stream, positions)
        answers.sendall(json.dumps([kind, content]).encode() + b"\n")
        for values in arrays:
            answers.sendall(np.ascontiguousarray(values))


def _answer(stream: TrainingStream, positions: Sequence[int]) -> tuple[str, object, list[np.ndarray]]:
    """A kind of answer, what it says in JSON, and the arrays that follow."""
    try:
        batch = stream.batch(positions)
    except InputError as error:
        return _INPUT_ERROR, str(error), []
    except Exception:
        return _BUG, traceback.format_exc(), []
    return _BATCH, [(name, values.dtype.str, values.shape) for name, values in batch.items()], list(batch.values())


def _die_with_parent(prctl: Callable[[int, int], int], parent: int) -> None:
    """Lets the kernel end this worker with the process that started it: a killed run would leave its workers behind."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
