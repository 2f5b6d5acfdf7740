"""Settings that must exist before Paddle is imported; every entry point calls `start()` first.

Measured on 2 cores (AMD), one DiT-S/2 training step: the math library path alone takes 6.3 s to 3.9 s, the allocator
settings to 3.5 s, dense transposes 2.7 s to 2.05 s. Nothing here overrides what the user has set,
`LATENT_DIFFUSION_TUNING=off` turns it off, and a GPU build of Paddle is left as it is.
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
from .native import library
from .stopping import follow_launcher

# glibc's mallopt parameters, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4

# Microseconds of CPU time that a container may use, or "max", and in how many microseconds.
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def start() -> str:
    """Applies the settings, imports Paddle and returns one line that names what was set.

    A process of a launched run ends with its launcher from here on.

    Raises:
        InputError: a shared library that Paddle needs is not installed; the message names its package.
    """
    follow_launcher()
    line = _tune()
    with _without_garbage_collection(), _without_import_notices(), naming_missing_libraries():
        import paddle  # noqa: F401
    return f"{line}, {library.state()}"


def announce(line: str) -> None:
    """Prints what `start` returns, once for all processes of a launched run."""
    if is_first_process():
        print(line, flush=True)


def is_first_process() -> bool:
    """Whether this is the process of a launched run that speaks for all, or the only one."""
    return os.environ.get("PADDLE_TRAINER_ID", "0") == "0"


def _tune() -> str:
    """Returns the line that names what was set."""
    if library.is_off("LATENT_DIFFUSION_TUNING"):
        return "runtime: nothing tuned, LATENT_DIFFUSION_TUNING is off"
    if "paddle" in sys.modules:
        return "runtime: nothing tuned, Paddle was imported before"
    if _gpu_build():
        return "runtime: nothing tuned, Paddle is a GPU build"
    if _launcher_set_threads():
        del os.environ["OMP_NUM_THREADS"]
    done = [f"{name}={os.environ.setdefault(name, value)}" for name, value in _environment().items()]
    if _keep_freed_memory():
        done.append("freed memory is kept")
    return "runtime: " + ", ".join(done)


def _environment() -> dict[str, str]:
    # Transposes then use the dense kernel in place of a slow strided copy; on a GPU views are the faster choice.
    settings = {"FLAGS_use_stride_kernel": "0"}
    cpu = library.cpu_info()
    if "AuthenticAMD" in cpu:
        # The math library that Paddle bundles takes a slow path on a processor that is not Intel's unless told.
        settings["MKL_DEBUG_CPU_TYPE"] = "7" if "avx512f" in cpu else "5"
    settings["OMP_NUM_THREADS"] = str(_threads())
    return settings


def _threads() -> int:
    """The cores, shared by the processes that Paddle's launcher has started on this machine; Paddle would take one."""
    processes = os.environ.get("PADDLE_LOCAL_SIZE")
    if processes is None and "PADDLE_TRAINER_ID" in os.environ:
        return 1  # another launcher, which does not say how many processes are on this machine
    return max(1, _cores() // int(processes or 1))


def _cores() -> int:
    """How many this process may use, by its affinity and by the quota of its container (Linux's cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text().split()
    except OSError:
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _launcher_set_threads() -> bool:
    """Whether Paddle's launcher set `OMP_NUM_THREADS`: it does, to 1, for its processes unless the user has set it.

    The user's variables are those that the launcher was started with; the kernel keeps them.
    """
    if "PADDLE_LOCAL_SIZE" not in os.environ or os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    try:
        users = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:  # not Linux: taken as the user's
        return False
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in users.split(b"\0"))


def _gpu_build() -> bool:
    # Paddle itself cannot be asked before it is imported.
    try:
        importlib.metadata.distribution("paddlepaddle-gpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _keep_freed_memory() -> bool:
    """Tells glibc to keep large freed blocks: each fresh mapping costs a page fault for every 4 KiB."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
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
