"""What the matrix products of a network are computed in. Weights, sums and the loss stay float32."""

import contextlib

import paddle

from .native import functions as native
from .native import library


def choose(dtype: str | None, device: str) -> tuple[str | None, str | None]:
    """The precision that `device` has for `dtype`, and a sentence if it is another one.

    A CPU has bfloat16 where its instructions and the kernels of `native/` are there, and no float16.

    Args:
        dtype: "float16" or "bfloat16", None for float32.
        device: "cpu" or "gpu".
    """
    if dtype is None or device == "gpu" or (dtype == "bfloat16" and library.has_bfloat16()):
        return dtype, None
    reason = (
        "a CPU" if dtype == "float16" else "this CPU, or its kernels are not built (python -m latent_diffusion.native)"
    )
    return None, f"{dtype} has no effect on {reason}; computing in float32"


def autocast(dtype: str | None):
    """A context in which networks compute in what `choose` gave for the current device (level O1)."""
    if dtype is None:
        return contextlib.nullcontext()
    if paddle.device.get_device() == "cpu":
        return native.bfloat16_products()
    return paddle.amp.auto_cast(level="O1", dtype=dtype)
