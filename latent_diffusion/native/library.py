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

# Set to "off" it leaves the kernels out.
SWITCH = "LATENT_DIFFUSION_KERNELS"

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
    """The library; None where it was not built for this machine, does not load, or is turned off.

    Paddle's own operations do the same then.
    """
    if is_off(SWITCH):
        return None
    try:
        library = ctypes.CDLL(str(path()))
    except OSError:
        return None
    return None if library.prepare() else library


def state() -> str:
    """Whether the kernels are used, and what to do where they are not built."""
    if load():
        return "native kernels"
    return "no native kernels" + ("" if is_off(SWITCH) else f" (python -m {__package__} builds them)")


def is_off(variable: str) -> bool:
    """Whether the user has set an environment variable to "off" (or 0, or false)."""
    return os.environ.get(variable, "").lower() in ("off", "0", "false")


def has_bfloat16() -> bool:
    """Whether the kernels are there, and the processor has instructions that multiply bfloat16."""
    return load() is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(instruction_sets())


def path() -> Path:
    """Where the library of this source, this processor and this Paddle belongs."""
    parts = (SOURCE.read_text(), *FLAGS, *LIBRARIES, *instruction_sets(), str(_paddle()), _paddle_version())
    return FOLDER / f"kernels-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"


def instruction_sets() -> list[str]:
    """Those that a compiler may use on this processor, by the names of Linux; elsewhere none is known."""
    lines = cpu_info().splitlines()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    # Other flags change with the system, such as mitigations.
    return sorted(flag for flag in flags if flag.startswith(("avx", "amx", "sse", "ssse", "fma", "f16c", "bmi")))


def cpu_info() -> str:
    """What Linux says of the processor; elsewhere nothing is detected."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _paddle() -> Path:
    return Path(importlib.util.find_spec("paddle").origin).parent


def _paddle_version() -> str:
    return (_paddle() / "version" / "__init__.py").read_text()
