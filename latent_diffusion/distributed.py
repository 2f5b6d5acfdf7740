"""The processes of a launched run (`python -m paddle.distributed.launch`); a run of its own is one process."""

import contextlib
import itertools
import time
import zlib
from collections.abc import Iterator

import numpy as np
import paddle
from paddle.base import core

from .errors import InputError

# How long a process is waited for, in seconds: longer than the largest checkpoint takes to be written. NCCL's limit.
PATIENCE = 1800.0

# Seconds between two looks at how many processes have reached a barrier; less at first.
POLL_INTERVAL = 0.1

_barriers, _texts = itertools.count(), itertools.count()


def start() -> tuple[int, int]:
    """Joins the other processes of the run.

    Returns:
        This process's rank and the number of processes.
    """
    world_size = paddle.distributed.get_world_size()
    if world_size > 1 and not paddle.distributed.is_initialized():
        paddle.distributed.init_parallel_env()
    return paddle.distributed.get_rank(), world_size


def barrier(patience: float = PATIENCE) -> None:
    """Waits until every process is here.

    `paddle.distributed.barrier` fails on a CPU when a process is 30 seconds late, a limit that cannot be set; so this
    one counts the processes in the store through which they found each other. Rank 0 serves the store and leaves last.

    Args:
        patience: seconds to wait; a machine that has lost its power tells nobody.

    Raises:
        InputError: a process has not come by then.
    """
    with _meeting(patience):
        pass


@contextlib.contextmanager
def _meeting(patience: float) -> Iterator[None]:
    """Begins when every process is here; within it the store can be read, since rank 0 leaves last."""
    rank, world_size = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    if world_size == 1:
        yield
        return
    store, number = core.create_or_get_global_tcp_store(), next(_barriers)
    _count(store, f"barrier {number} reached", world_size, patience)
    yield
    if rank == 0:
        _count(store, f"barrier {number} left", world_size, patience)
    else:
        store.add(f"barrier {number} left", 1)


def _count(store, key: str, world_size: int, patience: float) -> None:
    """Adds this process to a counter and waits for the others."""
    store.add(key, 1)
    deadline, pause = time.monotonic() + patience, POLL_INTERVAL / 100
    while (present := store.add(key, 0)) < world_size:
        if time.monotonic() > deadline:
            raise InputError(
                f"{world_size - present} of {world_size} processes did not come within {patience:g} seconds: one has "
                "died; stop the others and run the same command again"
            )
        time.sleep(pause)
        pause = min(2 * pause, POLL_INTERVAL)


def gather(text: str) -> list[str]:
    """The texts that all processes give, by rank; each waits for all."""
    rank, world_size = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    if world_size == 1:
        return [text]
    store, key = core.create_or_get_global_tcp_store(), f"text {next(_texts)}"
    store.set(f"{key} of {rank}", text)
    with _meeting(PATIENCE):
        return [store.get(f"{key} of {other}").decode() for other in range(world_size)]


def from_first(text: str) -> str:
    """The `text` that the first process has."""
    return gather(text)[0]


def check_agreement(model: paddle.nn.Layer, when: str) -> None:
    """Raises `InputError` on all processes unless all have the same weights, bit for bit.

    Args:
        model: its parameters are compared by a checksum of each.
        when: says in the message when they differ.
    """
    world_size = paddle.distributed.get_world_size()
    if world_size == 1:
        return
    sums = paddle.to_tensor([zlib.crc32(p.numpy()) for p in model.parameters()], dtype="int64")
    gathered = []
    paddle.distributed.all_gather(gathered, sums)
    differs = np.stack([other.numpy() != gathered[0].numpy() for other in gathered])
    if differs.any():
        ranks = np.flatnonzero(differs.any(axis=1)).tolist()
        name = [name for name, _ in model.named_parameters()][int(differs.any(axis=0).argmax())]
        raise InputError(
            f"{when} the weights of process {', '.join(map(str, ranks))} are not those of process 0 (the first is "
            f"{name}): a device, its memory or the network is at fault; training stops and saves nothing, run the same "
            "command again to go on from the newest checkpoint"
        )


@contextlib.contextmanager
def averaging_gradients(model: paddle.nn.Layer, recompute: bool) -> Iterator[None]:
    """Around the forward and backward pass of a model: afterwards gradients are means over all processes.

    `DataParallel` averages them during the backward pass, but cannot do so where activations are recomputed.
    """
    if not (recompute and isinstance(model, paddle.DataParallel)):
        yield
        return
    from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

    with model.no_sync():
        yield
    fused_allreduce_gradients(list(model.parameters()), None)
