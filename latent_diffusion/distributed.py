"""The processes of a launched run (`python -m paddle.distributed.launch`); a run of its own is one process."""

import paddle


def start() -> tuple[int, int]:
    """Joins the other processes of the run.

    Returns:
        This process's rank and the number of processes.
    """
    world_size = paddle.distributed.get_world_size()
    if world_size > 1 and not paddle.distributed.is_initialized():
        paddle.distributed.init_parallel_env()
    return paddle.distributed.get_rank(), world_size


def barrier() -> None:
    """Waits until every process is here."""
    if paddle.distributed.get_world_size() > 1:
        paddle.distributed.barrier()
