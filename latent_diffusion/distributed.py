"""The processes of a launched run (`python -m paddle.distributed.launch`); a run of its own is one process."""

import contextlib
import itertools
import time
from collections.abc import Iterator

import paddle
from paddle.base import core

from .errors import InputError

# How long a process is waited for, in seconds: longer than the largest checkpoint takes to be written. NCCL's limit.
PATIENCE = 1800.0

# Seconds between two looks at how many processes have reached a barrier.
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
    rank, world_size = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    if world_size == 1:
        return
    store, number = core.create_or_get_global_tcp_store(), next(_barriers)
    _count(store, f"barrier {number} reached", world_size, patience)
    if rank == 0:
        _count(store, f"barrier {number} left", world_size, patience)
    else:
        store.add(f"barrier {number} left", 1)


def _count(store, key: str, world_size: int, patience: float) -> None:
    """Adds this process to a counter and waits for the others."""
    store.add(key, 1)
    deadline = time.monotonic() + patience
    while (present := store.add(key, 0)) < world_size:
        if time.monotonic() > deadline:
            raise InputError(
                f"{world_size - present} of {world_size} processes did not come within {patience:g} seconds: one has "
                "died; stop the others and run the same command again"
            )
        time.sleep(POLL_INTERVAL)


def from_first(text: str) -> str:
    """The `text` that the first process has."""
    if paddle.distributed.get_world_size() == 1:
        return text
    store, key = core.create_or_get_global_tcp_store(), f"text {next(_texts)}"
    if paddle.distributed.get_rank() == 0:
        store.set(key, text)
    barrier()
    return store.get(key).decode()


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
