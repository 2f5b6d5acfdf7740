"""The device a command runs on."""

import resource

import paddle

from .errors import InputError


def select(name: str | None) -> str:
    """Makes `name`, "cpu" or "gpu", the device of what follows; None is the GPU where there is one.

    Returns:
        "cpu" or "gpu".

    Raises:
        InputError: a GPU is asked for where there is none.
    """
    has_gpu = paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    name = name or ("gpu" if has_gpu else "cpu")
    if name == "gpu" and not has_gpu:
        raise InputError("--device gpu needs a GPU and the GPU build of Paddle; see the README, or take --device cpu")
    # Under the launcher each process has a GPU of its own.
    paddle.set_device("cpu" if name == "cpu" else f"gpu:{paddle.distributed.ParallelEnv().device_id}")
    return name


def peak_memory() -> int:
    """Most memory this process has used, in bytes: on the GPU where it runs on one, else of the process."""
    if paddle.device.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
