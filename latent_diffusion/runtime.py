"""Settings that must exist before Paddle is imported; every entry point calls `start()` first.

Measured on 2 cores (AMD), one DiT-S/2 training step: the math library path alone takes 6.3 s to 3.9 s, the allocator
settings to 3.5 s, dense transposes 2.7 s to 2.05 s. Nothing here overrides what the user has set, and
`LATENT_DIFFUSION_TUNING=off` turns it off.
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import io
import os
import sys
import types
import warnings
from pathlib import Path

from .errors import naming_missing_libraries

# glibc's mallopt parameters, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def start() -> str:
    """Applies the settings, imports Paddle and returns one line that names what was set.

    Raises:
        InputError: a shared library that Paddle needs is not installed; the message names its package.
    """
    line = "runtime: nothing tuned" if _turned_off() or "paddle" in sys.modules else _tune()
    with _without_garbage_collection(), _without_import_notices(), naming_missing_libraries():
        import paddle  # noqa: F401
    return line


def is_first_process() -> bool:
    """Whether this is the process of a launched run that speaks for all, or the only one."""
    return os.environ.get("PADDLE_TRAINER_ID", "0") == "0"


def _turned_off() -> bool:
    return os.environ.get("LATENT_DIFFUSION_TUNING", "").lower() in ("off", "0", "false")


def _tune() -> str:
    done = [f"{name}={os.environ.setdefault(name, value)}" for name, value in _environment().items()]
    if _keep_freed_memory():
        done.append("freed memory is kept")
    return "runtime: " + ", ".join(done)


def _environment() -> dict[str, str]:
    settings = {}
    if not _gpu_build():
        # Transposes then use the dense kernel in place of a slow strided copy; on a GPU views are the faster choice.
        settings["FLAGS_use_stride_kernel"] = "0"
    cpu = _cpu_info()
    if "AuthenticAMD" in cpu:
        # The math library that Paddle bundles takes a slow path on a processor that is not Intel's unless told.
        settings["MKL_DEBUG_CPU_TYPE"] = "7" if "avx512f" in cpu else "5"
    # Paddle takes one thread by default. Under the launcher one thread a process is right, alone every core.
    alone = "PADDLE_TRAINER_ID" not in os.environ
    settings["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0))) if alone else "1"
    return settings


def _gpu_build() -> bool:
    # Paddle itself cannot be asked before it is imported.
    try:
        importlib.metadata.distribution("paddlepaddle-gpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: nothing is detected, Paddle's defaults apply
        return ""


def _keep_freed_memory() -> bool:
    """Tells glibc to keep large freed blocks: each fresh mapping costs a page fault for every 4 KiB."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all((mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 64 << 20)))


@contextlib.contextmanager
def _without_garbage_collection():
    """Importing makes objects that stay: looking for garbage among them takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def _without_import_notices():
    """Drops what Paddle prints at every import about thread counts, ccache and setuptools; keeps all else."""
    warnings.filterwarnings("ignore", message="No ccache found")
    warnings.filterwarnings("ignore", message="Setuptools is replacing distutils")
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            yield
    finally:
        kept = [line for line in captured.getvalue().splitlines() if "OMP_NUM_THREADS" not in line]
        if kept:
            print("\n".join(kept), file=sys.stderr)


def import_paddlenlp() -> None:
    """Imports PaddleNLP without its web server, which costs 0.6 of 4 seconds and is not used here.

    The placeholder is taken away afterwards, so that `import paddlenlp.server` still works.
    """
    if "paddlenlp" in sys.modules:
        return
    placeholder = types.ModuleType("paddlenlp.server")
    placeholder.SimpleServer = None
    sys.modules[placeholder.__name__] = placeholder
    try:
        with _without_garbage_collection():
            import paddlenlp  # noqa: F401
    finally:
        del sys.modules[placeholder.__name__]
