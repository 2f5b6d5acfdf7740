"""The library of `kernels.c`: built with the machine's C compiler, linked to the libraries that come with Paddle."""

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..errors import InputError
from ..files import write_file

SOURCE = Path(__file__).with_name("kernels.c")
FOLDER = SOURCE.with_name("build")

# Paddle's own libraries: its OpenMP, so that both share their threads, its matrix products, and oneDNN.
LIBRARIES = ("libiomp5.so", "libmklml_intel.so", "libdnnl.so.3")

# Arithmetic that may not trap and sets no errno can be done in vectors.
FLAGS = (
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-Wall",
    "-Wextra",
)


def build() -> Path:
    """Compiles the kernels for this processor and this Paddle; returns the library.

    Raises:
        InputError: there is no C compiler, or it fails; its first line of error says why.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise InputError("there is no C compiler (cc); Debian, Ubuntu: apt-get install gcc")
    folder = _paddle() / "libs"
    libraries = (*(f"-l:{name}" for name in LIBRARIES), "-lm", f"-L{folder}", f"-Wl,--no-undefined,-rpath,{folder}")

    def compile_and_link(target: Path) -> None:
        # In two steps, or the compiler would link an OpenMP of its own.
        with tempfile.NamedTemporaryFile(suffix=".o") as compiled:
            _run(compiler, *FLAGS, "-c", SOURCE, "-o", compiled.name)
            _run(compiler, "-shared", compiled.name, "-o", target, *libraries)

    write_file(path(), compile_and_link)
    return path()


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"the kernels do not build: {(done.stderr.strip() or 'no reason given').splitlines()[0]}")


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it is not `available`: Paddle's own operations do the same."""
    return ctypes.CDLL(str(path())) if available() else None


def available() -> bool:
    """Whether the kernels were built for this machine, and `LATENT_DIFFUSION_KERNELS=off` is not set."""
    turned_off = os.environ.get("LATENT_DIFFUSION_KERNELS", "").lower() in ("off", "0", "false")
    return not turned_off and path().is_file()


def has_bfloat16() -> bool:
    """Whether the kernels are available, and the processor has instructions that multiply bfloat16."""
    return available() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(processor_flags())


def path() -> Path:
    """Where the library of this source, this processor and this Paddle belongs."""
    parts = (SOURCE.read_text(), *FLAGS, *LIBRARIES, *processor_flags(), str(_paddle()))
    return FOLDER / f"kernels-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"


def processor_flags() -> list[str]:
    """What the processor can do, by the names of Linux; elsewhere nothing is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])


def _paddle() -> Path:
    return Path(importlib.util.find_spec("paddle").origin).parent
