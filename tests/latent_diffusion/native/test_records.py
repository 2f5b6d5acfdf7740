import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from latent_diffusion.native import library
from latent_diffusion.native.records import record_reader
from tests.cli.commands import REPOSITORY

pytestmark = pytest.mark.skipif(library.load() is None, reason="the kernels are not built")

ALL_HALVES = np.arange(1 << 16).astype(np.uint16).view(np.float16)


@pytest.fixture
def stored(tmp_path):
    """A function that writes an array to a file and returns its descriptor."""
    descriptors = []

    def write(array: np.ndarray) -> int:
        path = tmp_path / f"{len(descriptors)}.bin"
        path.write_bytes(array.tobytes())
        descriptors.append(os.open(path, os.O_RDONLY))
        return descriptors[-1]

    yield write
    for descriptor in descriptors:
        os.close(descriptor)


def read(files: list[int], positions: list[int], count: int, half: bool = True) -> tuple[bool, np.ndarray]:
    out = np.full((len(files), count), np.nan, np.float32)
    return record_reader()(out, np.array(files, np.int32), np.array(positions, np.int64), half), out


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.astype(np.float32).view(np.uint32))


def test_every_finite_half_becomes_the_same_float32(stored):
    """Subnormal numbers, both zeros and the largest numbers too, in a record of several parts."""
    halves = ALL_HALVES[np.isfinite(ALL_HALVES)]
    good, out = read([stored(halves)], [0], halves.size)
    assert good
    assert_same_bits(out[0], halves)


def test_every_half_that_is_not_finite_is_found(stored):
    chosen = np.concatenate([np.flatnonzero(~np.isfinite(ALL_HALVES)), [0, 0x7BFF, 0xFBFF]])
    file = stored(ALL_HALVES)
    assert [read([file], [2 * i], 1)[0] for i in chosen] == np.isfinite(ALL_HALVES[chosen]).tolist()


def test_float32_is_read_as_it_is(stored):
    limits = np.finfo(np.float32)
    values = np.array([0.0, -0.0, limits.max, limits.min, limits.tiny, limits.smallest_subnormal, -1.5, 1e-40], "f4")
    good, out = read([stored(values)], [0], values.size, half=False)
    assert good
    assert_same_bits(out[0], values)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 8191, 8192, 19_999])
def test_one_value_that_is_not_finite_is_found(stored, half, bad, at):
    values = np.ones((2, 20_000), np.float16 if half else np.float32)
    values[1, at] = bad
    file = stored(values)
    assert read([file], [0], 20_000, half)[0]
    assert not read([file] * 2, [0, values[0].nbytes], 20_000, half)[0]


@pytest.mark.parametrize("half", [True, False])
def test_records_of_several_files_are_read_where_they_begin(stored, half):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((5, 3000)).astype(np.float16 if half else np.float32) for _ in range(3)]
    files, record = [stored(array) for array in arrays], arrays[0][0].nbytes
    chosen = [(2, 4), (0, 0), (1, 3), (0, 4), (2, 4)]
    good, out = read([files[k] for k, _ in chosen], [r * record for _, r in chosen], 3000, half)
    assert good
    assert_same_bits(out, np.stack([arrays[k][r] for k, r in chosen]))


@pytest.mark.parametrize("half", [True, False])
def test_a_file_that_ends_before_or_cannot_be_read_is_found(stored, half):
    values = np.ones(10_000, np.float16 if half else np.float32)
    file = stored(values)
    assert read([file], [0], 10_000, half)[0]
    for files, positions in (
        ([file], [1]),
        ([file], [values.nbytes]),
        ([-1], [0]),
        ([file], [-1]),
        ([file, -1], [0, 0]),
    ):
        assert not read(files, positions, 10_000, half)[0]


def test_no_records_are_none():
    assert read([], [], 4)[0]


@pytest.mark.parametrize(
    ("out", "files", "positions"),
    [
        (np.empty((2, 3), np.float16), np.zeros(2, np.int32), np.zeros(2, np.int64)),
        (np.empty((3, 2), np.float32).T, np.zeros(2, np.int32), np.zeros(2, np.int64)),
        (np.empty((2, 3), np.float32), np.zeros(2, np.int64), np.zeros(2, np.int64)),
        (np.empty((2, 3), np.float32), np.zeros(1, np.int32), np.zeros(2, np.int64)),
        (np.empty((2, 3), np.float32), np.zeros(2, np.int32), np.zeros(1, np.int64)),
        (np.empty((2, 3), np.float32), np.zeros(2, np.int32), np.zeros(2, np.int32)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(out, files, positions):
    with pytest.raises(ValueError, match="does not fit 2 records"):
        record_reader()(out, files, positions, True)


def run(code: str, *arguments: object, **environment: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_reading_starts_no_thread_and_needs_no_paddle(tmp_path):
    """A forked worker may read."""
    code = """
import os, sys
import numpy as np
from latent_diffusion.native.records import record_reader
read, before = record_reader(), len(os.listdir("/proc/self/task"))
file = os.open(sys.argv[1], os.O_RDONLY)
files, positions = np.full(64, file, np.int32), np.arange(64) * 2
assert read(np.empty((64, 20_000), np.float32), files, positions, True)
print(len(os.listdir("/proc/self/task")) - before, "paddle" in sys.modules)
"""
    (tmp_path / "zeros").write_bytes(bytes(60_000))
    assert run(code, tmp_path / "zeros", OMP_NUM_THREADS=2) == "0 False"


# Gives at most 1000 bytes a call, and is interrupted before every other one.
INTERRUPTED = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <unistd.h>
ssize_t pread(int file, void *out, size_t size, off_t position) {
    static int calls;
    if (++calls % 2) return errno = EINTR, -1;
    ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    return real(file, out, size > 1000 ? 1000 : size, position);
}
ssize_t pread64(int file, void *out, size_t size, off_t position) { return pread(file, out, size, position); }
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs LD_PRELOAD and cc"
)
@pytest.mark.parametrize("kernels", ["on", "off"])
def test_interrupted_and_partial_reads_go_on(tmp_path, kernels):
    """With the kernel and without."""
    (tmp_path / "interrupted.c").write_text(INTERRUPTED)
    library = tmp_path / "interrupted.so"
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "interrupted.c", "-o", library, "-ldl"], check=True)
    code = """
import os, sys
from pathlib import Path
import numpy as np
from latent_diffusion.packed import PackedReader, PackedWriter
from latent_diffusion.records import ImageContents
folder, kernels = Path(sys.argv[1]), sys.argv[2] == "on"
values = np.random.default_rng(0).standard_normal((3, 2, 4, 32, 32)).astype(np.float16)
writer = PackedWriter(folder, ImageContents("latents", values.shape[1:], "float16", 3, 256, 0.5))
writer.claim()
writer.write(range(3), values, [0] * 3)
writer.finish([])
reader = PackedReader(folder)
if kernels:
    reader._read_in_python = None
np.testing.assert_array_equal(reader.read([2, 0], [1, 0]), values[[2, 0], [1, 0]])
short = len(os.pread(os.open(folder / "shard-00000.npy", os.O_RDONLY), 2000, 0))
print(short, bool(reader._read_records) == kernels)
"""
    found = run(code, tmp_path / "packed", kernels, LD_PRELOAD=library, LATENT_DIFFUSION_KERNELS=kernels)
    assert found == "1000 True"
