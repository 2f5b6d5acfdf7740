"""The ways in which the operations of the networks are computed; tests run each, all on a CPU."""

import contextlib

import pytest

from latent_diffusion import attention, ops
from latent_diffusion.native import functions

ON_CPU = ["kernels", "CPU formulations"]
ALL = [*ON_CPU, "GPU formulations", "GPU formulations, fused attention"]


@contextlib.contextmanager
def computing_with(name: str):
    """Within the context all operations take the form of this name; skips where the kernels are not built."""
    if name == "kernels":
        if functions.load() is None:
            pytest.skip("the kernels are not built (python -m latent_diffusion.native)")
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "covers", lambda x: False)
        if name.startswith("GPU"):
            patch.setattr(ops, "on_cpu", lambda x: False)
            patch.setattr(attention, "on_cpu", lambda x: False)
        yield
