"""Reads and writes files of weights and of optimizer state, without PyTorch and without running code from them.

Both Paddle and PyTorch store pickles, and a pickle may name any function to be called while it is read. Here a name in
the file only selects one of the few functions of this module, which rebuild arrays and nothing else; a file that names
anything else is refused. Sizes that a file claims are checked against the bytes it has before memory is taken for them.

Arrays may be read-only and may share memory with each other, as tied weights do: copy one before changing it.
Layouts are left as stored: a Linear's weight is (out, in) in a PyTorch file and (in, out) in a Paddle file.
"""

import contextlib
import json
import math
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import InputError
from .files import replace_file, set_usual_mode

WEIGHT_SUFFIXES = (".pdparams", ".pt", ".pth", ".bin", ".safetensors")

# Where published weights are looked for: the folders of the scripts of facebookresearch/DiT and of MindONE.
WEIGHT_FOLDERS = (Path("pretrained_models"), Path("models"))

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
# The number 0x1950A86A20F9469CFC6C, pickled on its own: how torch.save began a file before PyTorch 1.6.
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_SAFETENSORS_DTYPES = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64"}

_NAME_TABLE = "StructuredToParameterName@@"
_SPLIT_ARRAYS = "UnpackBigParamInfor@@"


# Where a file that `write_torch` or `write_safetensors` wrote keeps the configuration of its weights.
_CONFIG_RECORD = "config.json"


def find_published(names: Sequence[str], network: str, address: str) -> Path:
    """Published weights of an extractor of features, in the folders where they are kept.

    Args:
        names: of the file, the usual one first.
        network: names it in the error.
        address: folder on the web from which people get the first file.

    Raises:
        InputError: there is none.
    """
    candidates = [folder / name for folder in WEIGHT_FOLDERS for name in names]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise InputError(
            f"found no weights of {network}, usually {names[0]}, in {' or '.join(map(str, WEIGHT_FOLDERS))}; name them "
            f"with --weights (in training --eval_weights), or get them with: curl -L --create-dirs -o {candidates[0]} "
            f"{address}/{names[0]}"
        )
    return found


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads one set of weights from a `.pdparams`, `.pt`, `.pth`, `.bin` or `.safetensors` file.

    The content decides which reader is used, since a `.bin` or `.pdparams` file may hold any of the formats. Of a
    training checkpoint (a dict with "model" and "ema") the EMA weights are taken, or "model" where "ema" is None or
    absent.

    Returns:
        A flat dict of names and arrays, in the order, shapes and dtypes of the file; bfloat16 becomes float32.

    Raises:
        InputError: the file cannot be read, is refused, or holds anything but one set of weights.
    """
    return choose_weights(read_content(path), path)


def choose_weights(content: Any, path: str | os.PathLike, use_ema: bool = True) -> dict[str, np.ndarray]:
    """The one set of weights in what `read_content` gave for the file `path`.

    Args:
        content: a flat dict of names and arrays, or a training checkpoint that has such dicts under "model" and "ema".
        path: names the file in errors.
        use_ema: of a training checkpoint, take "ema" and, where that is None or absent, "model"; else "model" alone.

    Raises:
        InputError: there is no such set.
    """
    if isinstance(content, dict) and not all(isinstance(value, np.ndarray) for value in content.values()):
        keys = ("ema", "model") if use_ema else ("model",)
        content = next((content[key] for key in keys if content.get(key) is not None), content)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no weights: named arrays were expected, it has {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise InputError(f"{path} is not one set of weights: its entry {name!r:.80} is {type(value).__name__}")
    return content


def read_content(path: str | os.PathLike) -> Any:
    """Everything in a `.pdparams`, `.pt`, `.pth`, `.bin` or `.safetensors` file, by the reader that its content needs.

    Raises:
        InputError: the file cannot be read or is refused.
    """
    path = _existing(path)
    if path.suffix not in WEIGHT_SUFFIXES:
        raise InputError(f"{path} is not a weight file: its name ends in none of {', '.join(WEIGHT_SUFFIXES)}")
    head = _head(path)
    if path.suffix == ".safetensors" or _looks_like_safetensors(path, head):
        return read_safetensors(path)
    if path.suffix in (".pt", ".pth") or head.startswith((_ZIP, _OLD_TORCH)):
        return read_torch(path)
    return read_paddle(path)


def read_config(path: str | os.PathLike, record: str = _CONFIG_RECORD) -> dict | None:
    """The configuration that `write_torch` or `write_safetensors` stored with the weights, or None.

    Args:
        path: the file.
        record: the name of another configuration, which another program stored there.

    Raises:
        InputError: the file cannot be read, or its configuration is not a JSON object.
    """
    path = _existing(path)
    head = _head(path)
    text = None
    if head.startswith(_ZIP):
        with _refusing(path, "torch.save"), zipfile.ZipFile(path) as zip_file:
            text = _TorchArchive(zip_file, path).record(record)
    elif _looks_like_safetensors(path, head):
        from safetensors import safe_open

        with _refusing(path, "safetensors"), safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(record)
    if text is None:
        return None
    with _refusing(path, "weights with a configuration"):
        config = json.loads(text)
        _require(isinstance(config, dict), "a configuration that is no JSON object")
        return config


def read_paddle(path: str | os.PathLike) -> Any:
    """Reads what `paddle.save` wrote: weights (`.pdparams`), optimizer state (`.pdopt`) or a scheduler's state.

    Returns:
        The saved dicts, lists and tuples with NumPy arrays for tensors and plain Python values otherwise. Shapes and
        dtypes are those of the file, except that bfloat16 (which Paddle stores as uint16) becomes float32: cast it
        back before it is set on a bfloat16 parameter. The table of parameter names that `paddle.save` adds under
        "StructuredToParameterName@@" is dropped, and arrays that it split for size are joined.

    Raises:
        InputError: the file is missing, empty, damaged or in another format, or asks for anything but arrays.
    """
    path = _existing(path)
    head = _head(path)
    if head.startswith((_ZIP, _OLD_TORCH)):
        raise InputError(f"{path} is not a file of paddle.save: it looks like one of PyTorch")
    if not head.startswith(_PICKLE):
        raise InputError(f"{path} is not a file of paddle.save: it does not begin as a pickle does")
    with _refusing(path, "paddle.save"), path.open("rb") as file:
        content = _plain(_Unpickler(file, path, _PADDLE_GLOBALS).load())
        if isinstance(content, dict):
            content.pop(_NAME_TABLE, None)
            _join_split_arrays(content)
        return content


def read_torch(path: str | os.PathLike) -> Any:
    """Reads what `torch.save` wrote, without PyTorch: a zip archive, or before PyTorch 1.6 pickles and then the data.

    Returns:
        The saved dicts, lists and tuples with NumPy arrays for tensors and parameters, plain Python values otherwise.
        Shapes and dtypes are those of the file, except that bfloat16 becomes float32. An `argparse.Namespace` becomes
        a dict.

    Raises:
        InputError: the file is missing, empty, damaged or in another format, or asks for anything but tensors.
    """
    path = _existing(path)
    head = _head(path)
    if head.startswith(_OLD_TORCH):
        with _refusing(path, "torch.save"), path.open("rb") as file:
            return _plain(_read_old_torch(file, path))
    if not head.startswith(_ZIP):
        raise InputError(f"{path} is not a file of torch.save: it is no zip archive")
    with _refusing(path, "torch.save"), zipfile.ZipFile(path) as zip_file:
        archive = _TorchArchive(zip_file, path)
        with archive.open("data.pkl") as file:
            return _plain(_Unpickler(file, path, _TORCH_GLOBALS, archive.storage).load())


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a safetensors file.

    Returns:
        Names and arrays with the shapes and dtypes of the file; bfloat16 becomes float32.

    Raises:
        InputError: the file is missing, empty, damaged or in another format, or has a dtype that NumPy lacks.
    """
    from safetensors import deserialize, safe_open

    path = _existing(path)
    with _refusing(path, "safetensors"):
        with safe_open(path, framework="np") as file:
            names = file.keys()
            dtypes = {file.get_slice(name).get_dtype() for name in names}
            if unknown := dtypes - _SAFETENSORS_DTYPES:
                # Whether the library itself reads them depends on what else has been imported.
                raise ValueError(f"NumPy has no dtype {unknown.pop()}")
            if "BF16" not in dtypes:
                return {name: file.get_tensor(name) for name in names}
        # safe_open needs the optional package ml_dtypes for bfloat16.
        tensors = deserialize(path.read_bytes())
        return {name: _safetensor(**tensor) for name, tensor in tensors}


def read_object_array(path: str | os.PathLike) -> list[Any]:
    """Reads an `.npy` file of an object array with one axis: a pickle, of which nothing is executed.

    Returns:
        The array's elements: NumPy arrays and plain Python values.

    Raises:
        InputError: the file is missing, empty, damaged or in another format, or asks for anything but arrays.
    """
    path = _existing(path)
    with _refusing(path, "numpy.save"), path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        _require(version == (1, 0), f"version {version} of the format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        _require(dtype.kind == "O" and len(shape) == 1, f"an array of {dtype} {shape}, where objects were expected")
        content = _plain(_Unpickler(file, path, _NUMPY_GLOBALS).load())
        _require(type(content) is list and (len(content),) == shape, "a pickle that is not of its array")
        return content


def write_paddle(path: str | os.PathLike, state: dict) -> None:
    """Writes `state` (tensors, arrays, nested dicts, plain values) with `paddle.save`, whole or not at all.

    A reader sees the former file under `path`, or the complete new one, never a part.

    Raises:
        Whatever `paddle.save` or the file system raises; then `path` is as it was and nothing is left beside it.
    """
    import paddle

    replace_file(Path(path), lambda temporary: paddle.save(state, str(temporary)))


def write_torch(path: str | os.PathLike, weights: dict[str, np.ndarray], config: dict) -> None:
    """Writes a state dict as `torch.save` does, without PyTorch; `torch.load(path, weights_only=True)` reads it.

    The file is the zip archive of PyTorch 1.6 and later. Its further record `config.json`, which PyTorch ignores, is
    for `read_config`.

    Args:
        path: appears only when it is complete.
        weights: names and arrays, written as float32 in PyTorch's layout: see `transpose_linear`.
        config: plain values that describe them.
    """

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as file:
            add = partial(_add_record, file)
            add("data.pkl", _torch_pickle({name: value.shape for name, value in weights.items()}))
            add("byteorder", b"little")
            add(_CONFIG_RECORD, json.dumps(config).encode())
            for key, value in enumerate(weights.values()):
                add(f"data/{key}", np.asarray(value, "<f4").tobytes())
            add("version", b"3\n")

    replace_file(Path(path), write)


def write_safetensors(
    path: str | os.PathLike, weights: dict[str, np.ndarray], config: dict | None = None, layout: str = "pt"
) -> None:
    """Writes weights as float32 in a safetensors file.

    Args:
        path: appears only when it is complete.
        weights: names and arrays.
        config: plain values that describe them, for `read_config`.
        layout: whose layout they have, "pt" for PyTorch's; the entry "format" by which other readers tell.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    metadata = {"format": layout} | ({} if config is None else {_CONFIG_RECORD: json.dumps(config)})
    tensors = {name: np.ascontiguousarray(value, "<f4") for name, value in weights.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            if found := re.search(r"os error (\d+)", str(error)):  # all it says of what the system said
                raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
            raise
        set_usual_mode(temporary)

    replace_file(Path(path), write)


def transpose_linear(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights in PyTorch's layout in Paddle's, or back: a Linear's weight is (out, in) there and (in, out) here.

    Every matrix is taken for a Linear's weight unless its name says that it is an embedding table.
    """
    return {
        name: np.ascontiguousarray(value.T) if value.ndim == 2 and "embedding_table" not in name else value
        for name, value in weights.items()
    }


def is_torch_layout(weight: np.ndarray) -> bool:
    """Whether the weight of a Linear with more outputs than inputs is stored (out, in), as PyTorch does."""
    return weight.shape[:1] > weight.shape[-1:]


# Checks around reading


class _Refused(Exception):
    """The file has something that files of its kind do not have; `_refusing` adds the file's name."""


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from error
    # Reading a pipe would wait forever.
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a file")
    if status.st_size == 0:
        raise InputError(f"{path} is empty")
    return path


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(32)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from error


def _looks_like_safetensors(path: Path, head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


@contextlib.contextmanager
def _refusing(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except _Refused as refusal:
        raise InputError(f"{path} was refused: {refusal}") from refusal
    # What a damaged file makes the readers stumble over cannot be listed, and nothing but the file is at work here.
    except Exception as error:
        raise InputError(f"{path} is damaged or not a file of {kind}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__} {first_line[:200]}".rstrip()


# The restricted unpickler


# Text operations, sets, extension codes and out-of-band buffers are left out: neither format needs them.
_OPERATIONS = """
    PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""


# Numbers below it are their own hashes.
_KEYS = 2**60


class _Operations(dict):
    def __missing__(self, code: int):
        raise _Refused(f"it has the pickle operation {code:#x}, which no such file needs")


# The Python unpickler rather than the C one: its operations can be restricted too, and the C one sets aside memory for
# any memo index a file names, so that six bytes can take 30 GB. Bulk data is one operation per array in either.
class _Unpickler(pickle._Unpickler):
    """Calls only the functions in `allowed`, changes only objects of this module, and looks nothing up elsewhere."""

    def __init__(self, file: BinaryIO, path: Path, allowed: dict[str, Any], load_storage: Callable | None = None):
        super().__init__(file)
        self._path = path
        self._allowed = allowed
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self._allowed:
            shown = full_name if full_name.isprintable() else repr(full_name)
            raise InputError(f"{self._path} was refused: it asks for {shown:.200}, which does not belong in it")
        return self._allowed[full_name]

    def persistent_load(self, pid: Any) -> Any:
        _require(self._load_storage is not None, "a reference to data outside the file")
        return self._load_storage(pid)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack.pop()
        _require(kind is _NAMESPACE and arguments == (), "a new object of an unexpected kind")
        self.append(_Namespace())

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    def load_build(self) -> None:
        # The stock operation would set attributes on whatever object the file puts there, functions included.
        state = self.stack.pop()
        target = self.stack[-1]
        _require(isinstance(target, _Restorable), "a state for an object that takes none")
        target.restore(state)

    _codes = [getattr(pickle, name)[0] for name in _OPERATIONS.split()]
    dispatch = _Operations((code, pickle._Unpickler.dispatch[code]) for code in _codes)
    dispatch |= {pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build}
    dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise _Refused(f"it has {found}")


def _check_keys(keys: Iterable[Any]) -> None:
    """Before they are put into a dict: many keys of one hash, as other numbers can have, would take hours."""
    _require(
        all(type(key) is str or type(key) is int and abs(key) < _KEYS for key in keys),
        "a dict key that is neither text nor a small number",
    )


def _is_sizes(values: Any) -> bool:
    return type(values) is tuple and all(type(value) is int and value >= 0 for value in values)


# Stand-ins for the objects a file describes; `_plain` replaces them once the file is read.


class _Marker:
    """A name that a file may mention but not call."""


_NDARRAY = _Marker()
_NAMESPACE = _Marker()


class _Restorable:
    """An object that takes a state after it was made."""

    def restore(self, state: Any) -> None:
        raise NotImplementedError


class _OrderedDict(dict, _Restorable):
    def restore(self, state: Any) -> None:
        """Ignores the attributes: PyTorch hangs the version numbers of modules on a state dict."""


class _Namespace(dict, _Restorable):
    def restore(self, state: Any) -> None:
        _require(type(state) is dict and all(type(key) is str for key in state), "a malformed Namespace")
        self.update(state)


class _DType(_Restorable):
    # No object dtype, as its elements are pickled objects; none with fields or text.
    CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")

    def __init__(self, code: Any, align: Any = False, copy: Any = True):
        _require(type(code) is str and code in self.CODES, f"the dtype {code!r:.40}")
        self.value = np.dtype(f"<{code}")

    def restore(self, state: Any) -> None:
        little_endian = type(state) is tuple and state[1:2] in (("<",), ("|",))
        _require(little_endian and state == (3, state[1], None, None, None, -1, -1, 0), "a malformed dtype")


class _ObjectDType(_Restorable):
    def restore(self, state: Any) -> None:
        _require(state == (3, "|", None, None, None, -1, -1, 63), "a malformed dtype")


class _Array(_Restorable):
    def __init__(self, value: np.ndarray | list | None = None):
        self.value = value

    def restore(self, state: Any) -> None:
        _require(self.value is None and type(state) is tuple and len(state) == 5, "a malformed array")
        version, shape, dtype, fortran_order, data = state
        if type(dtype) is _ObjectDType:
            _require(type(data) is list, "a malformed array")
            self.value = data
            return
        _require(version == 1 and type(dtype) is _DType and _is_sizes(shape), "a malformed array")
        size = math.prod(shape) * dtype.value.itemsize
        _require(type(data) is bytes and len(data) == size, "an array whose data does not have the claimed size")
        self.value = np.ndarray(shape, dtype.value, data, order="F" if fortran_order is True else "C")


class _Storage:
    def __init__(self, values: np.ndarray):
        self.values = values


class _StorageType:
    def __init__(self, dtype: str):
        self.dtype = np.dtype(dtype)


# What the names in a file stand for: NumPy and Paddle


def _new_ndarray(kind: Any, shape: Any, typecode: Any) -> _Array:
    _require(kind is _NDARRAY and shape == (0,) and typecode == b"b", "a malformed array")
    return _Array()


def _new_dtype(*arguments: Any) -> _DType:
    return _DType(*arguments)


def _new_any_dtype(*arguments: Any) -> _DType | _ObjectDType:
    return _ObjectDType() if arguments[:1] == ("O8",) else _DType(*arguments)


def _scalar(dtype: Any, data: Any) -> bool | int | float | complex:
    _require(type(dtype) is _DType and type(data) is bytes and len(data) == dtype.value.itemsize, "a malformed scalar")
    return np.ndarray((), dtype.value, data).item()


def _encoded(text: Any, encoding: Any) -> bytes:
    # How bytes are written in pickle protocol 2.
    _require(type(text) is str and encoding == "latin1", "malformed bytes")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _named_tensor(pair: Any) -> _Array:
    # A Tensor is written as tuple((name, array)).
    _require(type(pair) is tuple and len(pair) == 2 and type(pair[0]) is str, "a malformed tensor")
    _require(type(pair[1]) is _Array, "a malformed tensor")
    return pair[1]


def _unnamed_tensor(expression: Any, variables: Any) -> _Array:
    # A DenseTensor is written as eval("data", {"data": array}); nothing else is taken and nothing is evaluated.
    exact = type(expression) is str and expression == "data" and type(variables) is dict and list(variables) == ["data"]
    _require(exact and type(variables["data"]) is _Array, "an expression to evaluate")
    return variables["data"]


def _ordered_dict(pairs: Any = ()) -> _OrderedDict:
    is_pairs = type(pairs) in (list, tuple) and all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs)
    _require(is_pairs, "a malformed OrderedDict")
    _check_keys(key for key, _ in pairs)
    return _OrderedDict(pairs)


_ARRAY_GLOBALS = {
    "numpy.core.multiarray._reconstruct": _new_ndarray,
    "numpy._core.multiarray._reconstruct": _new_ndarray,
    "numpy.ndarray": _NDARRAY,
}

# What `numpy.save` names for an object array of arrays and plain values.
_NUMPY_GLOBALS = _ARRAY_GLOBALS | {"numpy.dtype": _new_any_dtype}

_PADDLE_GLOBALS = _ARRAY_GLOBALS | {
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.dtype": _new_dtype,
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encoded,
    # Python 2's name of the module is what pickle protocol 2 writes.
    "builtins.bytes": _no_bytes,
    "__builtin__.bytes": _no_bytes,
    "builtins.tuple": _named_tensor,
    "__builtin__.tuple": _named_tensor,
    "builtins.eval": _unnamed_tensor,
    "__builtin__.eval": _unnamed_tensor,
}


def _join_split_arrays(content: dict) -> None:
    # In pickle protocols 2 and 3 an array above 1 GiB is written flat, in slices of that size.
    table = content.pop(_SPLIT_ARRAYS, {})
    for name, entry in table.items():
        slices = [content.pop(part) for part in entry["slices"]]
        _require(all(isinstance(part, np.ndarray) for part in slices), "a malformed table of split arrays")
        _require(name not in content and _is_sizes(entry["OriginShape"]), "a malformed table of split arrays")
        content[name] = np.concatenate(slices).reshape(entry["OriginShape"])


# What the names in a file stand for: PyTorch


class _TorchArchive:
    """The entries of a PyTorch file; each storage is read once."""

    def __init__(self, zip_file: zipfile.ZipFile, path: Path):
        self._zip = zip_file
        self._path = path
        self._storages: dict[tuple[str, np.dtype], _Storage] = {}
        roots = [name[: -len("data.pkl")] for name in zip_file.namelist() if re.fullmatch("[^/]+/data.pkl", name)]
        if len(roots) != 1:
            raise InputError(f"{path} is not a file of torch.save: the zip archive does not have one data.pkl")
        self._root = roots[0]
        self._check_entries()

    def open(self, name: str) -> BinaryIO:
        return self._zip.open(self._root + name)

    def record(self, name: str) -> bytes | None:
        """The bytes of an entry, or None where there is none."""
        return self._zip.read(self._root + name) if self._root + name in self._zip.namelist() else None

    def storage(self, pid: Any) -> _Storage:
        _require(type(pid) is tuple and len(pid) == 5 and pid[0] == "storage", "a malformed storage")
        _, kind, key, _, count = pid
        _require(type(kind) is _StorageType and type(key) is str and type(count) is int, "a malformed storage")
        if (key, kind.dtype) not in self._storages:
            self._storages[key, kind.dtype] = _Storage(_float32_of_bfloat16(self._values(key, kind.dtype)))
        storage = self._storages[key, kind.dtype]
        _require(storage.values.size == count, "a storage whose data does not have the claimed size")
        return storage

    def _values(self, key: str, dtype: np.dtype) -> np.ndarray:
        data = self._zip.read(f"{self._root}data/{key}")
        _require(len(data) % dtype.itemsize == 0, "a storage whose data does not have the claimed size")
        return np.ndarray((len(data) // dtype.itemsize,), dtype, data)

    def _check_entries(self) -> None:
        entries = self._zip.infolist()
        # torch.save never compresses. With this, what is read in total cannot exceed the size of the file.
        _require(all(entry.compress_type == zipfile.ZIP_STORED for entry in entries), "compressed entries")
        _require(all(entry.compress_size == entry.file_size for entry in entries), "entries of two sizes")
        # Other programs may take another one of them.
        _require(len({entry.filename for entry in entries}) == len(entries), "two entries of one name")
        _require(sum(entry.file_size for entry in entries) <= self._path.stat().st_size, "overlapping entries")
        if self.record("byteorder") not in (None, b"little"):
            raise InputError(f"{self._path} is not in little-endian byte order; re-save it on a common machine")


def _read_old_torch(file: BinaryIO, path: Path) -> Any:
    """The object in a file of PyTorch before 1.6, as `_legacy_save` of `torch/serialization.py` writes it.

    Pickles follow each other: a number, a version, facts about the machine, the object and the keys of its storages;
    then comes the data of each storage behind its count. So the object is read twice, first for the types of storages.
    """

    def unpickled(allowed: dict[str, Any], load_storage: Callable | None = None) -> Any:
        return _Unpickler(file, path, allowed, load_storage).load()

    _number, version, machine = (unpickled({}) for _ in range(3))
    _require(version == 1001 and type(machine) is dict, "a format that PyTorch did not have")
    _require(machine.get("little_endian") is True, "a byte order other than little-endian")
    start, kinds = file.tell(), {}
    unpickled(_TORCH_GLOBALS | {_TORCH_TENSOR: _unread_tensor}, lambda pid: _note_storage(pid, kinds))
    keys = unpickled({})
    _require(type(keys) is list and len(keys) == len(kinds) and set(keys) == set(kinds), "malformed keys of storages")
    storages = {key: _Storage(_float32_of_bfloat16(_old_storage(file, path, *kinds[key]))) for key in keys}
    file.seek(start)
    return unpickled(_TORCH_GLOBALS, lambda pid: storages[pid[2]])


def _note_storage(pid: Any, kinds: dict[str, tuple[np.dtype, int]]) -> None:
    _require(type(pid) is tuple and len(pid) == 6 and pid[0] == "storage", "a malformed storage")
    _, kind, key, _, count, view = pid
    _require(type(kind) is _StorageType and type(key) is str and type(count) is int, "a malformed storage")
    _require(view is None, "a view of a storage, as PyTorch wrote it before version 0.4")
    _require(kinds.setdefault(key, (kind.dtype, count)) == (kind.dtype, count), "two storages of one key")


def _unread_tensor(*_details: Any) -> _Array:
    return _Array(np.empty(0))


def _old_storage(file: BinaryIO, path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    claimed = int.from_bytes(file.read(8), "little")
    left = path.stat().st_size - file.tell()
    _require(claimed == count and count * dtype.itemsize <= left, "a storage whose data does not have the claimed size")
    return np.ndarray((count,), dtype, file.read(count * dtype.itemsize))


def _rebuilt_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_training_details: Any) -> _Array:
    _require(type(storage) is _Storage and type(offset) is int and offset >= 0, "a malformed tensor")
    _require(_is_sizes(size) and _is_sizes(stride) and len(size) == len(stride), "a malformed tensor")
    values = storage.values
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
    # The count matters too: with a stride of 0 a few bytes could stand for any number of elements.
    _require(count == 0 or (last < values.size and count <= values.size), "a tensor that reaches beyond its storage")
    if count == 0:
        return _Array(np.empty(size, values.dtype))
    item = values.itemsize
    return _Array(np.ndarray(size, values.dtype, values, offset * item, tuple(step * item for step in stride)))


def _rebuilt_parameter(tensor: Any, *_training_details: Any) -> _Array:
    _require(type(tensor) is _Array, "a malformed parameter")
    return tensor


_TORCH_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    # NumPy has no bfloat16: as in Paddle's files, uint16 stands for it until it is widened.
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
    "UntypedStorage": "<u1",
}

_TORCH_TENSOR = "torch._utils._rebuild_tensor_v2"

_TORCH_GLOBALS = {
    _TORCH_TENSOR: _rebuilt_tensor,
    "torch._utils._rebuild_parameter": _rebuilt_parameter,
    "collections.OrderedDict": _ordered_dict,
    "argparse.Namespace": _NAMESPACE,
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in _TORCH_STORAGES.items()},
    "torch.storage.UntypedStorage": _StorageType("<u1"),
}


# Writing PyTorch files


def _torch_pickle(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """The `data.pkl` of a dict of contiguous float32 tensors; the storage of each is named by its position."""
    items = (_pickled(name) + _pickled_tensor(str(key), shape) for key, (name, shape) in enumerate(shapes.items()))
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS + pickle.STOP


def _pickled_tensor(key: str, shape: tuple[int, ...]) -> bytes:
    """A call of `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`."""
    count = math.prod(shape)
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    kind = _pickled_global("torch", "FloatStorage")
    storage = _pickled_tuple(_pickled("storage"), kind, _pickled(key), _pickled("cpu"), _pickled(count))
    hooks = _pickled_global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    return (
        _pickled_global("torch._utils", "_rebuild_tensor_v2")
        + _pickled_tuple(storage + pickle.BINPERSID, *map(_pickled, (0, shape, stride, False)), hooks)
        + pickle.REDUCE
    )


def _pickled_global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _pickled_tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _pickled(value: Any) -> bytes:
    """The operations that push a plain value."""
    pickled = pickle.dumps(value, protocol=2)
    return pickled[len(pickle.PROTO) + 1 : -len(pickle.STOP)]


# As torch.save does, so that a file mapped into memory has its tensors aligned.
_ALIGNMENT = 64


def _add_record(file: zipfile.ZipFile, name: str, data: Any) -> None:
    """Adds an uncompressed entry whose data begins at a multiple of the alignment."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    # A padding field: its two-letter name and its length take 4 bytes, the entry's own header takes 30.
    padding = -(file.fp.tell() + 30 + len(entry.filename) + 4) % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    file.writestr(entry, data)


# From stand-ins to what is returned


def _plain(content: Any, done: dict[int, Any] | None = None) -> Any:
    # By identity: a file may refer to one list so often that walking each reference would never end.
    done = {} if done is None else done
    if id(content) not in done:
        done[id(content)] = _plain_value(content, done)
    return done[id(content)]


def _plain_value(content: Any, done: dict[int, Any]) -> Any:
    if content is None or type(content) in (bool, int, float, complex, str, bytes):
        return content
    if type(content) is _Array:
        _require(content.value is not None, "an array without data")
        if type(content.value) is list:
            return _plain(content.value, done)
        return _float32_of_bfloat16(content.value)
    if isinstance(content, dict):
        return {key: _plain(value, done) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(_plain(value, done) for value in content)
    raise _Refused(f"it has a {type(content).__name__} where a value is expected")


def _float32_of_bfloat16(values: np.ndarray) -> np.ndarray:
    """Takes uint16 for bfloat16, which is the upper half of a float32; returns other dtypes as they are."""
    if values.dtype != np.uint16:
        return values
    wide = values.astype("<u4")
    wide <<= np.uint32(16)
    return wide.view("<f4")


def _safetensor(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    if dtype == "BF16":
        return _float32_of_bfloat16(np.ndarray(shape, "<u2", data))
    code = {"BOOL": "?", "U8": "u1", "I8": "i1"}.get(dtype)
    return np.ndarray(shape, code or f"<{dtype[0].lower()}{int(dtype[1:]) // 8}", data)
