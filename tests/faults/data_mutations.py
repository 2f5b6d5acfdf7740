"""Ways in which files and folders are damaged, swapped or replaced. Each is named after what it does to one file.

A mutation gets the folder of a case, the path of the file below it, and a generator; it returns the paths below the
folder, beside that of the file, whose values it may change.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

# The file that a payload makes where it is executed, in the folder of the case.
MARKER = "executed"

Mutation = Callable[[Path, str, np.random.Generator], list[str]]

BYTES: dict[str, Mutation] = {}
ARRAYS: dict[str, Mutation] = {}
JSON: dict[str, Mutation] = {}
ENTRIES: dict[str, Mutation] = {}
# What leaves all values as they are, if it is let in.
HARMLESS = {"big-endian", "Fortran's order", "version 2", "version 3", "float64", "a link to itself elsewhere"}
# What a process without rights has to read.
UNPRIVILEGED = {"unreadable", "unreadable folder", "unsearchable folder"}


class Payload:
    """Makes the marker when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (MARKER,)


def of_content(name: str, kinds: dict[str, Mutation] = BYTES) -> Callable:
    """Registers a function of a file's content and a generator that gives another content."""

    def register(change: Callable[[bytes, np.random.Generator], bytes]) -> Callable:
        def mutate(folder: Path, path: str, rng: np.random.Generator) -> list[str]:
            (folder / path).write_bytes(change((folder / path).read_bytes(), rng))
            return []

        kinds[name] = mutate
        return change

    return register


def of_entry(name: str) -> Callable[[Mutation], Mutation]:
    """Registers a mutation of what lies under a name."""

    def register(mutate: Mutation) -> Mutation:
        ENTRIES[name] = mutate
        return mutate

    return register


# Bytes


@of_content("cut off")
def _(data, rng):
    return data[: int(rng.integers(len(data)))] if data else b""


@of_content("empty")
def _(data, rng):
    return b""


@of_content("one byte less")
def _(data, rng):
    return data[:-1]


@of_content("one byte more")
def _(data, rng):
    return data + b"\0"


@of_content("damaged start")
def _(data, rng):
    return _damaged(data, rng, min(128, len(data)))


@of_content("damaged anywhere")
def _(data, rng):
    return _damaged(data, rng, len(data))


def _damaged(data: bytes, rng: np.random.Generator, end: int) -> bytes:
    changed = bytearray(data)
    for position in rng.integers(end, size=rng.integers(1, 6)) if end else ():
        changed[position] = rng.integers(256)
    return bytes(changed)


@of_content("zeros")
def _(data, rng):
    return bytes(len(data))


@of_content("noise")
def _(data, rng):
    return rng.bytes(len(data))


@of_content("a line of text")
def _(data, rng):
    return b"<html>not found</html>\n"


# Arrays


def of_array(name: str) -> Callable:
    """Registers a function of an array that gives another one, or the bytes of a file."""

    def register(change: Callable[[np.ndarray], object]) -> Callable:
        @of_content(name, ARRAYS)
        def _(data, rng):
            array = np.load(io.BytesIO(data), allow_pickle=True)
            changed = change(np.zeros((3, 4), np.float32) if array.dtype == object else array)
            if isinstance(changed, bytes):
                return changed
            file = io.BytesIO()
            np.save(file, changed, allow_pickle=True)
            return file.getvalue()

        return change

    return register


for dtype in ("float64", "float16", "int64", "int32", "uint8", "bool", "complex64", "S3", "U3", "M8[s]", "i4,f4"):
    of_array(dtype)(lambda array, dtype=dtype: np.resize(array, array.shape).astype(dtype))

of_array("big-endian")(lambda array: array.astype(array.dtype.newbyteorder(">")))
of_array("Fortran's order")(lambda array: np.asfortranarray(array))
of_array("one axis more")(lambda array: np.stack([array, array]))
of_array("an axis of length 1 more")(lambda array: array[None])
of_array("flat")(lambda array: array.ravel())
of_array("transposed")(lambda array: np.ascontiguousarray(array.T)[..., :1])
of_array("no numbers")(lambda array: array.ravel()[:0])
of_array("not a number")(lambda array: _with_value(array, np.nan))
of_array("infinite")(lambda array: _with_value(array, -np.inf))
of_array("float64 beyond float32")(lambda array: _with_value(array.astype(np.float64), 1e300))
of_array("negative")(lambda array: np.full_like(array, -5))
of_array("huge numbers")(lambda array: np.full(array.shape, 2**62))
of_array("unsigned and huge")(lambda array: np.full(array.shape, 2**64 - 1, np.uint64))
of_array("objects")(lambda array: np.array([Payload(), None], dtype=object))
of_array("objects of its shape")(lambda array: np.full(array.shape, Payload(), dtype=object))
of_array("a bare pickle")(lambda array: b"cposix\nmkdir\n(S'" + MARKER.encode() + b"'\ntR.")
of_array("an archive")(lambda array: _archive(array))
of_array("version 2")(lambda array: _saved(array, (2, 0)))
of_array("version 3")(lambda array: _saved(array, (3, 0)))
of_array("version 9")(lambda array: b"\x93NUMPY\x09" + _saved(array, (1, 0))[7:])
of_array("ten to the fifteen numbers")(
    lambda array: _file("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }")
)
of_array("negative shape")(lambda array: _file("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4), }"))
of_array("a side of 500 digits")(
    lambda array: _file(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 500},), }}")
)
of_array("a header of four gigabytes")(lambda array: b"\x93NUMPY\x02\x00\xff\xff\xff\xff{")
of_array("a long header")(
    lambda array: _file("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }" + " " * 60_000)
)
of_array("a header nested deeply")(lambda array: _file("(" * 9_000))
of_array("a header that calls")(lambda array: _file(f"__import__('os').mkdir('{MARKER}')"))
of_array("a header without its shape")(lambda array: _file("{'descr': '<f4', 'fortran_order': False}"))
of_array("a shape twice")(lambda array: _file("{'descr': '<f4', 'shape': (4,), 'shape': (1,)}"))


def _with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.astype(array.dtype if array.dtype.kind == "f" else np.float32)
    changed.reshape(-1)[-1:] = value
    return changed


def _archive(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


def _saved(array: np.ndarray, version: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def _file(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)


# JSON

_STRANGE = [None, True, -1, 0, 1.5, 10**18, 10**400, float("nan"), float("inf"), 1e308, 1e-308]
_STRANGE += ["", "x", "../x.npy", "a\nb", "\ud800", [], ["x", 3], [10**18] * 4, {}]
_STRANGE += [{"file": "/dev/zero", "sha256": "0", "records": 6}]


@of_content("a value changed", JSON)
def _(data, rng):
    content = json.loads(data)
    parent, key = _somewhere(content, rng)
    parent[key] = _STRANGE[rng.integers(len(_STRANGE))]
    return json.dumps(content).encode()


@of_content("a value missing", JSON)
def _(data, rng):
    content = json.loads(data)
    parent, key = _somewhere(content, rng)
    del parent[key]
    return json.dumps(content).encode()


@of_content("an entry twice", JSON)
def _(data, rng):
    content = json.loads(data)
    for value in content.values():
        if isinstance(value, list):
            value += value[:1]
    return json.dumps(content).encode()


@of_content("a key twice", JSON)
def _(data, rng):
    content = json.loads(data)
    key = list(content)[rng.integers(len(content))]
    return data.rstrip().removesuffix(b"}") + f', {json.dumps(key)}: "x"}}'.encode()


def _somewhere(content: object, rng: np.random.Generator) -> tuple[dict | list, object]:
    """A list or object in a JSON value, and a key of it."""
    key = list(content)[rng.integers(len(content))] if isinstance(content, dict) else int(rng.integers(len(content)))
    if isinstance(content[key], dict | list) and content[key] and rng.random() < 0.6:
        return _somewhere(content[key], rng)
    return content, key


of_content("a list", JSON)(lambda data, rng: b"[1, 2]")
of_content("pairs in a list", JSON)(lambda data, rng: b'[["a", 1], [2, 3]]')
of_content("nested deeply", JSON)(lambda data, rng: b"[" * 200_000)
of_content("a number of 9,000 digits", JSON)(lambda data, rng: b'{"records": ' + b"9" * 9_000 + b"}")
of_content("UTF-16", JSON)(lambda data, rng: data.decode().encode("utf-16"))


# What lies under a name


@of_entry("deleted")
def _(folder, path, rng):
    (folder / path).unlink()
    return []


@of_entry("swapped with its neighbor")
def _(folder, path, rng):
    if (other := _neighbor(folder, path, rng)) is None:
        return []
    first, second = (folder / path).read_bytes(), (folder / other).read_bytes()
    (folder / path).write_bytes(second)
    (folder / other).write_bytes(first)
    return [other]


@of_entry("overwritten with its neighbor")
def _(folder, path, rng):
    if other := _neighbor(folder, path, rng):
        shutil.copyfile(folder / other, folder / path)
    return []


@of_entry("overwritten with another kind of file")
def _(folder, path, rng):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    shutil.copyfile(files[rng.integers(len(files))], folder / "copy")
    (folder / "copy").replace(folder / path)
    return []


def _neighbor(folder: Path, path: str, rng: np.random.Generator) -> str | None:
    mine = folder / path
    others = sorted(p for p in mine.parent.iterdir() if p.suffix == mine.suffix and p != mine and p.is_file())
    return str(others[rng.integers(len(others))].relative_to(folder)) if others else None


def of_name(name: str, rename: Callable[[str], str | bytes]) -> None:
    """Registers a mutation that gives a file another name, and one that leaves a copy under it."""

    def target(folder: Path, path: str) -> bytes:
        return os.path.join(os.fsencode((folder / path).parent), os.fsencode(rename(Path(path).name)))  # noqa: PTH118

    def renamed(folder: Path, path: str, rng: np.random.Generator) -> list[str]:
        with contextlib.suppress(OSError):  # a name too long
            (folder / path).rename(os.fsdecode(target(folder, path)))
        return [os.fsdecode(os.path.relpath(target(folder, path), os.fsencode(folder)))]

    def copied(folder: Path, path: str, rng: np.random.Generator) -> list[str]:
        with contextlib.suppress(OSError):
            shutil.copyfile(folder / path, os.fsdecode(target(folder, path)))
        return [os.fsdecode(os.path.relpath(target(folder, path), os.fsencode(folder)))]

    ENTRIES[f"renamed, {name}"] = renamed
    ENTRIES[f"a copy, {name}"] = copied


of_name("a leading zero", lambda name: f"0{name}")
of_name("another number", lambda name: f"77{name}")
of_name("another digit one", lambda name: name.replace("1", "١").replace("0", "٠"))  # noqa: RUF001
of_name("a line break", lambda name: f"a\nerror: b{name}")
of_name("no text", lambda name: b"\xff\xfe" + name.encode())
of_name("very long", lambda name: ("9" * (255 - len(name))) + name)
of_name("another suffix", lambda name: f"{name}.bak")
of_name("capital letters", lambda name: name.upper())
of_name("hidden", lambda name: f".{name}")
of_name("a caption", lambda name: name.replace(".", "_3.", 1))
of_name("a control character", lambda name: f"\x1b[31m{name}")


def replaced(name: str) -> Callable:
    """Registers a mutation that puts something else under the name of a file."""

    def register(make: Callable[[Path], object]) -> Callable:
        def mutate(folder: Path, path: str, rng: np.random.Generator) -> list[str]:
            (folder / path).rename(folder / "moved")
            make(folder / path)
            return []

        ENTRIES[name] = mutate
        return make

    return register


replaced("a folder in its place")(lambda path: path.mkdir())
replaced("a pipe in its place")(lambda path: os.mkfifo(path))
replaced("a link to nothing")(lambda path: path.symlink_to("nowhere"))
replaced("a link to itself")(lambda path: path.symlink_to(path.name))
replaced("a link to its folder")(lambda path: path.symlink_to("."))
replaced("a link to the folder above")(lambda path: path.symlink_to(".."))
replaced("a link to an endless device")(lambda path: path.symlink_to("/dev/zero"))
replaced("a link to an empty device")(lambda path: path.symlink_to("/dev/null"))
replaced("a link to a terminal")(lambda path: path.symlink_to("/dev/tty"))
replaced("a link to the memory of the process")(lambda path: path.symlink_to("/proc/self/mem"))
replaced("a file of a terabyte")(lambda path: (path.touch(), os.truncate(path, 1 << 40)))


@replaced("a socket in its place")
def _(path):
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


@of_entry("a link to itself elsewhere")
def _(folder, path, rng):
    elsewhere = folder.with_name(f"{folder.name}.elsewhere")
    (folder / path).rename(elsewhere)
    (folder / path).symlink_to(elsewhere.absolute())
    return []


@of_entry("a loop of links beside it")
def _(folder, path, rng):
    parent = (folder / path).parent
    (parent / "loop").symlink_to(parent.absolute())
    for name, other in (("here", "there"), ("there", "here")):
        (parent / name).mkdir()
        (parent / name / "on").symlink_to(f"../{other}")
    return []


@of_entry("unreadable")
def _(folder, path, rng):
    (folder / path).chmod(0)
    return []


@of_entry("unreadable folder")
def _(folder, path, rng):
    (folder / path).parent.chmod(0o111)
    return [str(Path(path).parent)]


@of_entry("unsearchable folder")
def _(folder, path, rng):
    (folder / path).parent.chmod(0)
    return [str(Path(path).parent)]


@of_entry("its folder emptied")
def _(folder, path, rng):
    parent = (folder / path).parent
    shutil.rmtree(parent)
    parent.mkdir()
    return [str(Path(path).parent)]


@of_entry("its folder gone")
def _(folder, path, rng):
    shutil.rmtree((folder / path).parent)
    return [str(Path(path).parent)]


@of_entry("a file in place of its folder")
def _(folder, path, rng):
    shutil.rmtree((folder / path).parent)
    (folder / path).parent.touch()
    return [str(Path(path).parent)]


@of_entry("a link to its folder elsewhere")
def _(folder, path, rng):
    parent = (folder / path).parent
    if parent == folder:
        return []
    elsewhere = folder.with_name(f"{folder.name}.elsewhere")
    parent.rename(elsewhere)
    parent.symlink_to(elsewhere.absolute())
    return []


def kinds_of(path: str) -> dict[str, Mutation]:
    """The mutations that a file of this name can have."""
    special = {".npy": ARRAYS, ".json": JSON}.get(Path(path).suffix, {})
    return BYTES | special | ENTRIES
