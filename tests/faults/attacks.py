"""The table of attacks: hostile files of every kind that this project reads, each with the function that reads it."""

import atexit
import bz2
import functools
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import paddle
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from demo.tiny_sdxl import write_pipeline
from dit.configuration import DiTConfig
from dit.export import read_labels
from dit.features import open_features
from dit.images import ImageStore
from dit.modeling import DiT
from dit.pretrained import load_dit
from latent_diffusion import checkpoint
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.ema import EMA
from latent_diffusion.evaluation.clip_score import CLIPScorer
from latent_diffusion.evaluation.dinov2 import load_dinov2
from latent_diffusion.evaluation.feature_cache import FeatureCache
from latent_diffusion.evaluation.image_set import open_images
from latent_diffusion.evaluation.inception import load_inception
from latent_diffusion.evaluation.pixels import Pixels
from latent_diffusion.evaluation.statistics import read_statistics
from latent_diffusion.evaluation.sweep import Table
from latent_diffusion.features import read_array
from latent_diffusion.images import read_image
from latent_diffusion.optimizers import adamw, constant_with_warmup
from latent_diffusion.packed import PackedWriter
from latent_diffusion.records import ImageContents
from latent_diffusion.sample_folder import SampleFolder
from latent_diffusion.settings import claim_folder
from latent_diffusion.text_encoder import load_text_encoder, load_tokenizer
from latent_diffusion.trainer import check_state
from latent_diffusion.vae import load_vae
from latent_diffusion.weights import read_config, read_object_array, read_paddle, read_weights, write_paddle
from sdxl_lora.dataset import open_dataset
from sdxl_lora.lora import read_lora
from sdxl_lora.pretrained import (
    load_noise_schedule,
    load_scheduler,
    load_unet,
    zeros_for_empty_prompt,
)
from sdxl_lora.text_encoders import TextEncoders
from tests.latent_diffusion.test_weights import (
    HOSTILE,
    HOSTILE_OBJECTS,
    MARKER,
    TOUCH,
    Global,
    call,
    encode,
    numpy_array,
    pickled,
    safetensors_file,
    torch_file,
    torch_tensor,
)
from uvit_ldm.captions import read_captions, read_prompts_file
from uvit_ldm.feature_files import read_prompts
from uvit_ldm.pretrained import read_pretrained as read_uvit

from .hostile import Attack

DATA = Path(__file__).parents[1] / "data"

CONFIG = DiTConfig(8, 4, 4, 1, 2, 8, num_classes=3)

RUN = f"touch {MARKER}"
SYSTEM = pickled({"a": call("os", "system", RUN)})
HUGE = 10**9

Content = bytes | Callable[[Path], object]


def attacks() -> list[Attack]:
    """All attacks, in an order that does not change."""
    tables = (
        *(pickles, object_arrays, torch_archives, safetensors, checkpoints, arrays, archives),
        *(json_files, yaml_files, tar_shards, images, captions, model_folders, datasets, pipelines),
    )
    return [attack for table in tables for attack in table()]


def warm_up() -> None:
    """Lets every reader import what it needs, so that an attack is measured and not that."""
    load_vae(str(DATA / "vae" / "vae_tiny"))
    from ppdiffusers.transformers import (  # noqa: F401
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionModelWithProjection,
    )

    _checkpoint_files()
    _pipeline()


# Pickles


def pickles() -> Iterator[Attack]:
    for name, (content, _) in (HOSTILE | _PICKLES).items():
        kind = "safetensors" if name.endswith(".safetensors") else "pickles"
        yield Attack(kind, name, read_weights, name, content)
    yield Attack("pickles", "system in a learning rate", read_paddle, "scheduler.pdparams", SYSTEM)
    yield Attack("pickles", "system in Inception's weights", load_inception, "inception.pth", torch_file(SYSTEM))
    yield Attack("pickles", "system in DINOv2's weights", load_dinov2, "dinov2.pth", torch_file(SYSTEM))
    yield Attack("pickles", "system in a U-ViT", read_uvit, "nnet.pth", torch_file(SYSTEM))


def _colliding(count: int) -> bytes:
    """A dict whose keys have one hash: each is compared with all before it."""
    keys = b"".join(pickle.dumps(number * (2**61 - 1), 2)[2:-1] + b"K\x00" for number in range(1, count))
    return b"\x80\x02}(" + keys + b"u."


_DEEP_BYTES = functools.reduce(lambda inner, _: pickle.dumps(inner, 4), range(200), SYSTEM)

_PICKLES = {
    "protocol_0.pdparams": (b"cos\nsystem\n(S'" + RUN.encode() + b"'\ntR.", ""),
    "protocol_1.bin": (b"(cposix\nsystem\nq\x00U\x04trueq\x01tRq\x02.", ""),
    "subprocess.pdparams": (pickled(call("subprocess", "check_output", ["touch", MARKER])), ""),
    "apply.pdparams": (pickled(call("functools", "reduce", Global("builtins", "eval"), [TOUCH])), ""),
    "compile.pdparams": (pickled(call("builtins", "compile", TOUCH, "x", "exec")), ""),
    "runpy.pdparams": (pickled(call("runpy", "_run_code", TOUCH, {})), ""),
    "codecs_open.pdparams": (pickled(call("codecs", "open", MARKER, "w")), ""),
    "own_module.pdparams": (pickled(call("latent_diffusion.files", "sync", "/etc/passwd")), ""),
    "numpy_load.pdparams": (pickled(call("numpy", "load", "x.npy", None, True)), ""),
    "numpy_runstring.pdparams": (pickled(call("numpy.testing._private.utils", "runstring", TOUCH, {})), ""),
    "paddle_load.pdparams": (pickled(call("paddle", "load", "x")), ""),
    "torch_compile.pt": (torch_file(call("torch.jit", "load", "x")), ""),
    "dotted_stack_global.pdparams": (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", ""),
    "globals_by_memo.pdparams": (
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x9400\x68\x00\x68\x01\x93\x8c\x04true\x85R.",
        "",
    ),
    "extension_2.pdparams": (b"\x80\x02\x83\x01\x00.", ""),
    "extension_4.pdparams": (b"\x80\x02\x84\x01\x00\x00\x00.", ""),
    "persistent_text.pdparams": (b"\x80\x02Pos.system\n.", ""),
    "new_object_ex.pdparams": (
        b"\x80\x04" + encode(Global("os", "system")) + encode((RUN,)) + b"}\x92.",
        "",
    ),
    "set.pdparams": (b"\x80\x04\x8f\x94(" + encode(RUN) + b"\x90.", ""),
    "frozen_set.pdparams": (b"\x80\x04(" + encode(RUN) + b"\x91.", ""),
    "bytearray.pdparams": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.", ""),
    "out_of_band.pdparams": (b"\x80\x05\x97\x98.", ""),
    "huge_text.pdparams": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", ""),
    "huge_binbytes.pdparams": (b"\x80\x03B" + struct.pack("<I", 2**32 - 1) + b"x.", ""),
    "many_gigabytes.pdparams": (b"\x80\x04\x8e" + struct.pack("<Q", 3 << 30) + b"x.", ""),
    "huge_number.pdparams": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", ""),
    "frame_in_frame.pdparams": (b"\x80\x04" + (b"\x95" + struct.pack("<Q", 9)) * 5000 + b"N.", ""),
    "memo_index.pdparams": (b"\x80\x02]r\xff\xff\xff\xff.", ""),
    "missing_memo.pdparams": (b"\x80\x02j\xff\xff\xff\xff.", ""),
    "empty_stack.pdparams": (b"\x80\x02R.", ""),
    "marks.pdparams": (b"\x80\x02" + b"(" * 100_000 + b".", ""),
    "deep_tuples.pdparams": (b"\x80\x02N" + b"\x85" * 50_000 + b".", ""),
    "deep_dicts.pdparams": (b"\x80\x02" + b"}K\x01" * 20_000 + b"N" + b"s" * 20_000 + b".", ""),
    "pickle_in_bytes.pdparams": (pickle.dumps({"a": _DEEP_BYTES}, 4), ""),
    "one_hash.pdparams": (_colliding(60_000), ""),
    "one_hash_ordered.pdparams": (
        pickled(call("collections", "OrderedDict", [(number * (2**61 - 1), 0) for number in range(30_000)])),
        "",
    ),
    "tuple_keys.pdparams": (pickled({(number * (2**61 - 1),): 0 for number in range(20_000)}), ""),
    "list_key.pdparams": (b"\x80\x02}]K\x01s.", ""),
    "self_key.pdparams": (b"\x80\x02}q\x00h\x00K\x01s.", ""),
    "overlapping_views.pt": (
        torch_file({str(number): torch_tensor(size=(6,), stride=(1,)) for number in range(10)} | {"a": 1}),
        "",
    ),
    "dtype_list.pdparams": (pickled({"a": call("numpy", "dtype", [("x", "O")], False, True)}), ""),
    "dtype_object.pdparams": (pickled({"a": call("numpy", "dtype", "O", False, True)}), ""),
    "array_interface.pdparams": (pickled(call("numpy.core.multiarray", "fromfile", "/etc/passwd")), ""),
    "reduce_of_result.pdparams": (pickled(call("builtins", "tuple", ("a", numpy_array())))[:-1] + b")R.", ""),
}


def _old_tar() -> bytes:
    """As PyTorch wrote before version 0.1.10: a tar with pickles."""
    return _tar([("sys_info", pickled({})), ("pickle", SYSTEM), ("storages", SYSTEM), ("tensors", SYSTEM)])


def object_arrays() -> Iterator[Attack]:
    for name, (content, _) in HOSTILE_OBJECTS.items():
        if name not in ("half", "no array", "empty"):
            yield Attack("object arrays", name, read_object_array, "0.npy", content)
    shape = (77, 768)
    for name in ("call", "element", "eval"):
        content = HOSTILE_OBJECTS[name][0]
        yield Attack(
            "object arrays",
            f"{name} in run_vis",
            lambda path: read_prompts(path.parents[1], shape),
            "run_vis/0.npy",
            content,
        )
    header = "{'descr': '|O', 'fortran_order': False, 'shape': (" + "1," * 5000 + ")}"
    yield Attack("object arrays", "header of 5000 axes", read_object_array, "0.npy", _npy(header))


# Zip archives of PyTorch


def _zipped(entries: list[tuple[str, bytes]], change: Callable[[zipfile.ZipFile], object] | None = None) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data)
        if change:
            change(archive)
    return file.getvalue()


_PICKLE_ENTRY = ("archive/data.pkl", pickled({"a": torch_tensor()}))
_SIX = np.arange(6, dtype="<f4").tobytes()


def _encrypted() -> bytes:
    """An archive whose entries say that they are encrypted."""
    data = bytearray(torch_file({"a": torch_tensor()}))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := data.find(signature, at + 1)) >= 0:
            data[at + flags] |= 1
    return bytes(data)


def _lying_zip(size: int, compressed: int) -> bytes:
    """An archive whose directory says other sizes of a storage, in the fields of 64 bits."""

    def lie(archive: zipfile.ZipFile) -> None:
        entry = archive.getinfo("archive/data/0")
        entry.file_size, entry.compress_size = size, compressed

    return _zipped([_PICKLE_ENTRY, ("archive/data/0", _SIX)], lie)


def _many_pickles(path: Path) -> None:
    """A data.pkl of zeros: a file with a hole, of 20 GB."""
    with path.open("wb") as file:
        file.write(b"\x80\x02")
        file.truncate(20 << 30)


def torch_archives() -> Iterator[Attack]:
    storage = ("archive/data/0", _SIX)
    table: dict[str, Content] = {
        "an entry above the folder": _zipped([("../archive/data.pkl", SYSTEM), storage]),
        "an absolute entry": _zipped([("/archive/data.pkl", SYSTEM), storage]),
        "an entry of Windows": _zipped([("C:\\archive\\data.pkl", SYSTEM), storage]),
        "two data.pkl in one folder": _zipped([_PICKLE_ENTRY, storage, ("archive/data.pkl", SYSTEM)]),
        "two storages of one name": _zipped([_PICKLE_ENTRY, storage, ("archive/data/0", bytes(24))]),
        "encrypted": _encrypted(),
        "a storage of 4 EiB": _lying_zip(2**62, 2**62),
        "a storage that is compressed to nothing": _lying_zip(24, 0),
        "a storage longer than it is": _lying_zip(24, 2**62),
        "a storage of negative size": _lying_zip(24, 2**64 - 1),
        "a compressed data.pkl": torch_file(b"\x80\x02" + b"N" * 50_000_000 + b".", compression=zipfile.ZIP_DEFLATED),
        "bzip2": torch_file(bytes(50_000_000), compression=zipfile.ZIP_BZIP2),
        "a directory of 10,000 folders": _zipped([(f"{number}/data.pkl", b"") for number in range(10_000)]),
        "a pickle before the archive": SYSTEM + torch_file({"a": torch_tensor()}),
        "a TorchScript archive": _zipped(
            [("archive/data.pkl", pickled(call("__torch__", "Module"))), ("archive/code/__torch__.py", b"import os")]
        ),
        "a pickle of 20 GB": _many_pickles,
        "a directory far away": torch_file({"a": torch_tensor()})[:-10]
        + struct.pack("<IH", 2**32 - 2, 0)
        + b"\0\0\0\0",
    }
    for name, content in table.items():
        yield Attack("PyTorch archives", name, read_weights, "weights.pt", content)
    deep = _zipped([_PICKLE_ENTRY, storage, ("archive/config.json", b"[" * 100_000)])
    yield Attack("PyTorch archives", "a deep configuration", read_config, "weights.pt", deep)
    yield Attack("PyTorch archives", "the tar of PyTorch 0.1", read_weights, "weights.pt", _old_tar())


# safetensors


_TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'


def safetensors() -> Iterator[Attack]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    table: dict[str, bytes] = {
        "header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "header of 2**64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
        "header beyond the file": struct.pack("<Q", 1000) + b'{"a":',
        "header of 99 MB": struct.pack("<Q", 99_000_000) + b"{}",
        "header not JSON": struct.pack("<Q", 8) + b"\x80\x02cos\nsy",
        "header a list": safetensors_file([entry], bytes(8)),
        "deep header": struct.pack("<Q", 200_001) + b'{"a":' + b"[" * 199_996,
        "overlapping": safetensors_file({"a": entry, "b": entry}, bytes(8)),
        "beyond the file": safetensors_file({"a": entry | {"data_offsets": [0, 800]}}, bytes(8)),
        "negative offset": safetensors_file({"a": entry | {"data_offsets": [-8, 0]}}, bytes(8)),
        "offsets swapped": safetensors_file({"a": entry | {"data_offsets": [8, 0]}}, bytes(8)),
        "offsets of 2**64 - 1": safetensors_file({"a": entry | {"data_offsets": [2**64 - 8, 2**64 - 1]}}, bytes(8)),
        "a hole": safetensors_file({"a": entry | {"data_offsets": [8, 16]}}, bytes(16)),
        "shape overflows": safetensors_file({"a": entry | {"shape": [2**33, 2**33]}}, bytes(8)),
        "shape beyond its data": safetensors_file({"a": entry | {"shape": [HUGE]}}, bytes(8)),
        "negative shape": safetensors_file({"a": entry | {"shape": [-1, -2]}}, bytes(8)),
        "shape of fractions": safetensors_file({"a": entry | {"shape": [2.0]}}, bytes(8)),
        "unknown dtype": safetensors_file({"a": entry | {"dtype": "PICKLE"}}, bytes(8)),
        "object dtype": safetensors_file({"a": entry | {"dtype": "O"}}, SYSTEM[:8]),
        "two of one name": struct.pack("<Q", len(_TWICE)) + _TWICE + bytes(16),
        "metadata a number": safetensors_file({"__metadata__": 1, "a": entry}, bytes(8)),
        "metadata of numbers": safetensors_file({"__metadata__": {"format": 1}, "a": entry}, bytes(8)),
        "no offsets": safetensors_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        "no end": safetensors_file({"a": entry}, bytes(4)),
        "a pickle behind": safetensors_file({"a": entry}, bytes(8) + SYSTEM),
        "1000 axes": safetensors_file({"a": entry | {"shape": [1] * 999 + [2]}}, bytes(8)),
    }
    for name, content in table.items():
        yield Attack("safetensors", name, read_weights, "model.safetensors", content)
    deep = safetensors_file({"__metadata__": {"config.json": "[" * 100_000}, "a": entry}, bytes(8))
    yield Attack("safetensors", "deep configuration", read_config, "model.safetensors", deep)


# Checkpoint folders


def _training_parts() -> tuple:
    model = DiT(CONFIG)
    schedule = constant_with_warmup(1e-4, 10)
    scaler = paddle.amp.GradScaler(init_loss_scaling=1024.0)
    return model, EMA(model, 0.9), adamw(model, schedule, 0.0), schedule, scaler


@functools.cache
def _checkpoint_files() -> dict[str, bytes]:
    """The files of a checkpoint by name, made once."""
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, ema, optimizer, schedule, scaler = _training_parts()
        checkpoint.write_state(folder, model, ema, schedule, scaler)
        checkpoint.save_optimizer(folder / checkpoint.OPTIMIZER, optimizer, model)
        write_paddle(folder / "rng_state.pth", checkpoint.rng_state())
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _resume(path: Path) -> None:
    """What both trainers read of a checkpoint folder."""
    folder = path.parent
    model, ema, optimizer, schedule, scaler = _training_parts()
    checkpoint.check_config(folder, model.config)
    checkpoint.read_averaged_weights(folder, model, ema)
    checkpoint.load_optimizer(folder / checkpoint.OPTIMIZER, optimizer, model)
    checkpoint.read_schedule(folder, schedule, scaler)
    checkpoint.read_rng_state(folder / "rng_state.pth")


def _checkpoint_with(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        for name, data in _checkpoint_files().items():
            path.with_name(name).write_bytes(data)
        path.write_bytes(content)

    return write


def checkpoints() -> Iterator[Attack]:
    weights = pickled({"a": numpy_array()})
    bomb = pickled({"a": numpy_array((HUGE, HUGE))})
    wrong = {
        "model_state.pdparams": weights,
        "ema_state.pdparams": weights,
        "optimizer.pdopt": pickled({"x_moment1_0": numpy_array()}),
        "scheduler.pdparams": pickled({"last_epoch": "x"}),
        "rng_state.pth": pickled({"python": [1, [2], None], "numpy": [1], "paddle": []}),
    }
    for name, content in wrong.items():
        short = name.partition(".")[0]
        yield Attack("checkpoints", f"system in {short}", _resume, name, _checkpoint_with(SYSTEM))
        yield Attack("checkpoints", f"array of 4 EB in {short}", _resume, name, _checkpoint_with(bomb))
        yield Attack("checkpoints", f"a list in {short}", _resume, name, _checkpoint_with(pickled([1, 2])))
        yield Attack("checkpoints", f"something else in {short}", _resume, name, _checkpoint_with(content))
    numbers = pickled({"python": [3, [2**40] * 625, None], "numpy": ["MT19937", numpy_array(), 2**40, 0, 0.0]})
    yield Attack("checkpoints", "huge numbers in rng_state", _resume, "rng_state.pth", _checkpoint_with(numbers))
    for name in ("training_args.bin", "notes.pth"):
        yield Attack("checkpoints", f"system in {name}", _resume, name, _checkpoint_with(SYSTEM), is_read=False)
    # Without a GPU the loss is not scaled and this file only read.
    for name, content in {"system": SYSTEM, "array of 4 EB": bomb}.items():
        yield Attack("checkpoints", f"{name} in scaler", _resume, "scaler.pdparams", _checkpoint_with(content))
    for name, content in {"deep": b"[" * 100_000, "a list": b"[1]", "text": b"\xff"}.items():
        yield Attack("checkpoints", f"{name} in config.json", _resume, "config.json", _checkpoint_with(content))
        yield Attack(
            "checkpoints",
            f"{name} in the manifest",
            lambda path: checkpoint.newest_checkpoint(path.parents[1]),
            "checkpoint-3/manifest.json",
            content,
        )
    escape = {"version": 1, "step": 3, "samples": 3, "seed": 0, "files": {"../secret.txt": {"bytes": 16, "sha256": ""}}}
    yield Attack(
        "checkpoints",
        "a path in the manifest",
        lambda path: checkpoint.verify(path.parent),
        "checkpoint-3/manifest.json",
        json.dumps(escape).encode(),
        named="manifest.json",
    )
    for name, content in {
        "deep": b"[" * 100_000,
        "a list": b"[1]",
        "a key of no state": b'{"global_step": 3, "os.system": 1}',
        "another step": b'{"global_step": 4}',
        "a step of text": b'{"global_step": "3"}',
        "a log that is none": b'{"global_step": 3, "log_history": 5}',
    }.items():
        yield Attack(
            "checkpoints", f"{name} in the state", lambda path: check_state(path, 3), "trainer_state.json", content
        )
    for name, content in {"deep": b"[" * 100_000, "a number": b"7", "no step": b"{}"}.items():
        yield Attack(
            "checkpoints",
            f"{name} in evaluation.json",
            lambda path: checkpoint.read_best(path.parents[1]),
            "best/evaluation.json",
            content,
        )


# .npy and .npz


def _npy(header: str | bytes, data: bytes = b"", version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    size = struct.pack("<H" if version == (1, 0) else "<I", len(header) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + header + data


def _header(descr: str = "'<f4'", shape: str = "(2,)", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"


_HEADERS = {
    "objects": _npy(_header("'|O'"), SYSTEM),
    "objects in a field": _npy(_header("[('a', '|O')]"), SYSTEM),
    "a call in the header": _npy(f"__import__('os').system({RUN!r})"),
    "a call in the shape": _npy(_header(shape=f"(open({MARKER!r}, 'w'),)")),
    "a product in the shape": _npy(_header(shape="(9**9**9,)")),
    "10**18 elements": _npy(_header(shape=f"({10**18},)"), bytes(8)),
    "5 GB": _npy(_header(shape="(1250000000,)"), bytes(8)),
    "10**18 elements, in Fortran's order": _npy(_header(shape=f"({HUGE}, {HUGE})", order="True"), bytes(8)),
    "overflowing shape": _npy(_header(shape=f"({2**62}, 4)"), bytes(8)),
    "negative shape": _npy(_header(shape="(-1,)"), bytes(8)),
    "text of 2 GB": _npy(_header("'<U500000000'", "()"), b""),
    "no bytes each": _npy(_header("'|V0'", f"({10**18},)"), b""),
    "a sub-array": _npy(_header(f"('<f4', ({HUGE}, 8))", "()"), b""),
    "a header of 4 GiB": _npy("{", version=(2, 0), length=2**32 - 1),
    "a header of 2 MB": _npy(" " * 2_000_000 + _header(), bytes(8), (2, 0)),
    "a deep header": _npy("(" * 9000),
    "deep minus signs": _npy("-" * 9000 + "1"),
    "version 3": _npy(_header("[('\N{SNOWMAN}', '|O')]"), SYSTEM, (3, 0)),
    "version 9": _npy(_header(), bytes(8), (9, 9)),
    "a bare pickle": SYSTEM,
}


def arrays() -> Iterator[Attack]:
    for name, content in _HEADERS.items():
        yield Attack("arrays", f"{name} (a feature)", _read_feature, "0.npy", content)
    for name in ("objects", "10**18 elements", "a header of 4 GiB", "a call in the header"):
        content = _HEADERS[name]

        def write(path: Path, content: bytes = content) -> None:
            path.write_bytes(content)

        yield Attack("arrays", f"{name} (a cache of features)", _read_cache, "features.npy", write)
        yield Attack("arrays", f"{name} (a packed shard)", _open_packed, "shard-00000.npy", _packed_with(content))
    for name, path in {"above": "../../secret.npy", "absolute": "/etc/passwd", "of no name": ".."}.items():
        yield Attack("arrays", f"a shard {name}", _open_packed, "manifest.json", _packed_with(shard=path))


def _read_feature(path: Path) -> None:
    read_array(path, (2,))


def _read_cache(path: Path) -> None:
    cache = FeatureCache.__new__(FeatureCache)
    cache.path, cache._count, cache._widths = path.parent, 2, {"features": 4}
    cache.read()


def _open_packed(path: Path) -> None:
    open_features(path.parent, CONFIG)


def _packed_with(content: bytes | None = None, shard: str | None = None) -> Callable[[Path], None]:
    """Writes packed features whose shard, or whose entry of it, is another."""

    def write(path: Path) -> None:
        folder = path.parent
        writer = PackedWriter(folder, ImageContents("moments", (1, 8, 8, 8), "float16", 2, 64, 0.5, vae="x"))
        writer.claim()
        writer.write([0, 1], np.zeros((2, 1, 8, 8, 8), np.float16), [0, 1])
        writer.finish([])
        if content is not None:
            (folder / "shard-00000.npy").write_bytes(content)
        if shard is not None:
            manifest = json.loads(path.read_text())
            manifest["shards"][0]["file"] = shard
            path.write_text(json.dumps(manifest))

    return write


def _npz(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()


def _statistics(path: Path) -> None:
    read_statistics(path, Pixels())


def _all_images(path: Path) -> None:
    images = open_images(path)
    for _ in images.read_ahead([range(images.count)]):
        pass


def archives() -> Iterator[Attack]:
    width = Pixels.widths["features"]
    covariance = _npy(_header(shape=f"({width}, {width})"), bytes(4 * width * width))
    for name in _HEADERS:
        if name != "a deep header":
            content = _npz({"mu.npy": _HEADERS[name], "sigma.npy": covariance})
            yield Attack("statistics", name, _statistics, "reference.npz", content)
    text = _npy(_header("'<U1000000'", "()"), bytes(4_000_000))
    table = {
        "a name of 4 MB": _npz({"mu.npy": b"", "extractor.npy": text}, zipfile.ZIP_DEFLATED),
        "an extractor of objects": _npz({"mu.npy": b"", "extractor.npy": _npy(_header("'|O'", "()"), SYSTEM)}),
        "a count of objects": _npz({"mu.npy": b"", "count.npy": _npy(_header("'|O'", "()"), SYSTEM)}),
        "no array at all": _npz({"mu.npy": SYSTEM}),
        "a path for a name": _npz({"../mu.npy": b"", "mu.npy": b"\x93NUMPY"}),
    }
    for name, content in table.items():
        yield Attack("statistics", name, _statistics, "reference.npz", content)
    for name in ("objects", "10**18 elements", "a header of 4 GiB", "no bytes each", "a sub-array", "version 3"):
        yield Attack("images in .npz", name, _all_images, "samples.npz", _npz({"arr_0.npy": _HEADERS[name]}))
    table = {
        "a bomb, bzip2": lambda path: _write_bomb(path, 1000, zipfile.ZIP_BZIP2),
        "a bomb, LZMA": lambda path: _write_bomb(path, 1000, zipfile.ZIP_LZMA),
        "a bomb of 300 MB, deflated": lambda path: _write_bomb(path, 10_000, zipfile.ZIP_DEFLATED),
        "a size that lies": _npz({"arr_0.npy": _npy(_header("'|u1'", "(9, 9, 9, 3)"), bytes(9))}),
        "no pixels": _npz({"arr_0.npy": _npy(_header("'|u1'", f"({2**62}, 0, 8, 3)"))}),
    }
    for name, content in table.items():
        yield Attack("images in .npz", name, _all_images, "samples.npz", content)


def _write_bomb(path: Path, side: int, compression: int) -> None:
    """An image of zeros, of so many pixels a side."""
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive, archive.open("arr_0.npy", "w") as entry:
        entry.write(_npy(_header("'|u1'", f"(1, {side}, {side}, 3)")))
        for _ in range(side):
            entry.write(bytes(3 * side))


# JSON


_JSON = {
    "deep lists": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 500_000,
    "a number of 5 million digits": b'{"sample_size": ' + b"9" * 5_000_000 + b"}",
    "not a number": b'{"sample_size": NaN}',
    "infinity": b'{"sample_size": Infinity}',
    "1e999": b'{"sample_size": 1e999}',
    "half a character": b'{"\\ud800": 1}',
    "no UTF-8": b'{"\xff": 1}',
    "zeros": bytes(1000),
    "a list": b"[1, 2]",
    "a number": b"7",
}


def _link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


_STRANGE: dict[str, Content] = {
    "endless, by a link": _link_to("/dev/zero"),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
    "20 GB of nothing": lambda path: _sparse(path, 20 << 30),
}


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


_OTHERS = {
    "COCO's captions": (read_captions, "captions.json"),
    "class names": (lambda path: read_labels(path, 1000), "labels.json"),
    "settings": (lambda path: claim_folder(path.parent, {"a": 1}, "--sample-dir"), "settings.json"),
    "packed features": (_open_packed, "manifest.json"),
    "a VAE": (lambda path: load_vae(str(path.parent)), "config.json"),
    "a text encoder": (lambda path: load_text_encoder(str(path.parent)), "config.json"),
    "a tokenizer": (lambda path: load_tokenizer(str(path.parent), 12), "tokenizer_config.json"),
    "a CLIP": (lambda path: CLIPScorer.load(str(path.parent)), "config.json"),
}


def _with_weights(content: Content) -> Callable[[Path], None]:
    """Writes the file beside weights and a vocabulary, which a folder of a model has."""

    def write(path: Path) -> None:
        (path.parent / "model_state.pdparams").write_bytes(pickled({"a": numpy_array()}))
        (path.parent / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\n")
        content(path) if callable(content) else path.write_bytes(content)

    return write


def json_files() -> Iterator[Attack]:
    for name, content in (_JSON | _STRANGE).items():
        yield Attack("JSON", f"{name} in a configuration", DiTConfig.from_json, "config.json", content)
    for owner, (read, file) in _OTHERS.items():
        for name in (
            "deep lists",
            "a number of 5 million digits",
            "a list",
            "no UTF-8",
            "a pipe",
            "endless, by a link",
        ):
            if not (owner == "class names" and name == "a list"):
                content = _with_weights((_JSON | _STRANGE)[name])
                yield Attack("JSON", f"{name} in the file of {owner}", read, file, content)
    for key, value in {
        "num_layers": HUGE,
        "attention_head_dim": 2**20,
        "num_classes": 10**12,
        "in_channels": HUGE,
        "sample_size": 2**20,
        "mlp_ratio": 1e15,
    }.items():
        values = CONFIG.to_dict() | {key: value}
        yield Attack(
            "JSON", f"a network of {key} {value:g}", load_dit, "model_state.pdparams", _dit_with(values), named="inside"
        )


def _dit_with(config: dict) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(_checkpoint_files()["model_state.pdparams"])
        path.with_name("config.json").write_text(json.dumps(config))

    return write


# YAML


def _read_yaml(path: Path) -> None:
    parser = ArgumentParser()
    parser.add_config()
    parser.add_argument("--labels", nargs="*")
    parser.add_argument("--seed", type=int)
    parser.parse_args(["--config", str(path)])


def yaml_files() -> Iterator[Attack]:
    laughs = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (letter, letter, b", ".join([b"*%c" % (letter - 1)] * 9)) for letter in range(98, 112)
    )
    merges = b"a: &a {x: 1}\n" + b"".join(
        b"%c: &%c {<<: [%s]}\n" % (letter, letter, b", ".join([b"*%c" % (letter - 1)] * 9)) for letter in range(98, 112)
    )
    table: dict[str, Content] = {
        "system": f"seed: !!python/object/apply:os.system ['{RUN}']\n".encode(),
        "a new object": b"seed: !!python/object/new:subprocess.Popen [[touch, x]]\n",
        "an import": b"seed: !!python/module:os\n",
        "a name": b"seed: !!python/name:os.system\n",
        "a tag of its own": b"seed: !evil {a: 1}\n",
        "a billion laughs": laughs + b"labels: *o\n",
        "a bomb of merged keys": merges,
        "a list in itself": b"labels: &a [*a]\n",
        "deep lists": b"labels: " + b"[" * 5_000,
        "deep blocks": b"- " * 5_000,
        "a number of a million digits": b"seed: " + b"9" * 1_000_000 + b"\n",
        "a date that is none": b"seed: 2020-99-99\n",
        "a key that is a list": b"? [1, 2]\n: 3\n",
        "a key that is itself": b"? &a [*a]\n: 3\n",
        "bytes that are none": b"seed: !!binary a\n",
        "a list of lists": b"labels: [[1, 2], {a: 1}]\n",
        "many documents": b"--- {}\n" * 10_000,
        "a pipe": _STRANGE["a pipe"],
        "endless, by a link": _STRANGE["endless, by a link"],
        "20 GB of nothing": _STRANGE["20 GB of nothing"],
    }
    for name, content in table.items():
        yield Attack("YAML", name, _read_yaml, "flags.yaml", content)


# Tar shards


def _tar(members: list[tuple[str, bytes]], **changes) -> bytes:
    """A tar; `changes` are attributes of the first member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in changes.items() if number == 0 else ():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _block(name: bytes, size: bytes = b"0" * 11 + b"\0", kind: bytes = b"0", magic: bytes = b"ustar\000") -> bytes:
    """A header with a right checksum."""
    head = name.ljust(100, b"\0") + b"0000644\0" * 3 + size.ljust(12, b"\0") + b"0" * 11 + b"\0"
    rest = kind + bytes(100) + magic
    block = (head + b" " * 8 + rest).ljust(512, b"\0")
    return head + b"%06o\0 " % sum(block) + rest.ljust(512 - len(head) - 8, b"\0")


def _base256(number: int) -> bytes:
    return (b"\xff" if number < 0 else b"\x80") + number.to_bytes(11, "big", signed=True)


def _extended(data: bytes, kind: bytes = b"x", size: int | None = None) -> bytes:
    """An extended header and a member behind it."""
    length = b"%011o\0" % (len(data) if size is None else size)
    return _block(b"pax", length, kind) + data + bytes(-len(data) % 512) + _SAMPLE


_PIXEL = io.BytesIO()
Image.new("RGB", (8, 8)).save(_PIXEL, "PNG")
_SAMPLE = _tar([("0.png", _PIXEL.getvalue()), ("0.cls", b"1")])
_LINKS = {"a link": tarfile.SYMTYPE, "a hard link": tarfile.LNKTYPE}


def _read_shard(path: Path) -> None:
    """Opens a shard and decodes its images."""
    store = ImageStore(path, CONFIG)
    for index in range(len(store)):
        store.sample(index, np.random.default_rng(0))


def tar_shards() -> Iterator[Attack]:
    label = ("0.cls", b"1")
    png = _PIXEL.getvalue()
    table: dict[str, Content] = {
        **{
            f"{name} to /etc/passwd": _tar([("0.png", b""), label], type=t, linkname="/etc/passwd")
            for name, t in _LINKS.items()
        },
        **{
            f"{name} as a class": _tar([("0.cls", b""), ("0.png", png)], type=t, linkname="../secret.txt")
            for name, t in _LINKS.items()
        },
        "a device": _tar([("0.png", b""), label], type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        "a pipe": _tar([("0.cls", b""), ("0.png", png)], type=tarfile.FIFOTYPE),
        "a sparse file": _tar([("0.png", png), label], type=tarfile.GNUTYPE_SPARSE),
        "a contiguous file of an unknown kind": _tar([("0.png", png), label], type=b"Z"),
        "negative size": _block(b"0.png", _base256(-512)) + _SAMPLE,
        "a circle by a negative size": _block(b"a.txt") + _block(b"0.txt", _base256(-512)) + _SAMPLE,
        "size 2**62": _block(b"0.png", _base256(2**62)) + _SAMPLE,
        "size 8 GB": _block(b"0.png", b"7" * 11 + b"\0") + _SAMPLE,
        "class of 8 GB": _block(b"0.cls", b"7" * 11 + b"\0") + _SAMPLE,
        "size no number": _block(b"0.png", b"99999999999\0") + _SAMPLE,
        "pax header of 8 GB": _extended(b"", size=0o77777777777),
        "pax header of 2**62": _block(b"pax", _base256(2**62), b"x") + _SAMPLE,
        "pax header of negative size": _block(b"pax", _base256(-1024), b"x") + _SAMPLE,
        "pax header of digits": _extended(b"1" * 400_000),
        "pax records of no length": _extended(b"0 path=a\n" * 1000),
        "pax size negative": _extended(b"14 size=-1024\n"),
        "a circle by a pax size": _block(b"a.txt") + _extended(b"14 size=-1536\n")[:1024] + _tar([("0.txt", b"x")]),
        "pax size 2**62": _extended(b"28 size=4611686018427387904\n"),
        "pax sparse": _extended(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n30 GNU.sparse.realsize=99999\n"),
        "pax sparse of pairs": _extended(b"29 GNU.sparse.map=1,2,3,4,5,6\n"),
        "pax headers one behind the other": _block(b"pax", b"%011o\0" % 0, b"x") * 3000 + _SAMPLE,
        "global pax header of 8 GB": _extended(b"", b"g", 0o77777777777),
        "long name of 8 GB": _extended(b"", b"L", 0o77777777777),
        "long name of 10 MB": lambda path: path.write_bytes(_extended(b"a" * 10_000_000, b"L")),
        "long names one behind the other": (_block(b"l", b"%011o\0" % 512, b"L") + b"a" * 512) * 3000 + _SAMPLE,
        "long link of 8 GB": _extended(b"", b"K", 0o77777777777),
        "gzip": zlib.compress(_SAMPLE, wbits=31),
        "bzip2": bz2.compress(_SAMPLE),
        "a bomb of gzip": zlib.compress(bytes(50_000_000), wbits=31),
        "zeros": bytes(1_000_000),
        "a damaged header in between": _SAMPLE[:1024] + b"\xff" * 512 + _SAMPLE[1024:],
        "cut off behind a header": _tar([("0.png", png), label, ("1.png", png), ("1.cls", b"1")])[:2048],
        "a pickle": SYSTEM,
        "a class of system": _tar([("0.cls", b"__import__('os')"), ("0.png", png)]),
        "a class of other digits": _tar([("0.cls", "\N{SUPERSCRIPT TWO}".encode()), ("0.png", png)]),
        "two of one name": _tar([("0.png", png), ("0.png", png), label]),
        "an image of system": _tar([("0.png", SYSTEM), label]),
        "endless, by a link": _STRANGE["endless, by a link"],
    }
    for name, content in table.items():
        yield Attack("tar shards", name, _read_shard, "0.tar", content)
    for name, path in {"above": "../../0", "absolute": "/tmp/0"}.items():
        # Members are read in place and never extracted: their names are keys.
        content = _tar([(f"{path}.png", png), (f"{path}.cls", b"1")])
        yield Attack("tar shards", f"a member {name}", _read_shard, "0.tar", content, is_read=False)


# Images


def _png(width: int, height: int, color: int = 0, data: bytes = b"", *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def _saved(format: str, size: tuple[int, int] = (64, 64), **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, format, **options)
    return file.getvalue()


def _ppm(width: int, height: int) -> bytes:
    return f"P6 {width} {height} 255\n".encode() + bytes(10)


_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(%pipe%touch code-was-run) (w) file\n%%EOF\n"
_SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script><image href="file:///etc/passwd"/></svg>'


def images() -> Iterator[Attack]:
    zeros = zlib.compress(bytes(13_000 * 13_001), 1)
    table: dict[str, Content] = {
        "PNG of 169 million pixels": _png(13_000, 13_000, data=zeros),
        "PNG of 4 Gpixels": _png(65_536, 65_536, data=zeros),
        "PNG of 2**31 - 1 pixels a side": _png(2**31 - 1, 2**31 - 1, data=zeros),
        "PNG of no pixels": _png(0, 0),
        "PNG with a text of 100 MB": _png(8, 8, 0, b"", (b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 1))),
        "PNG with a profile of 100 MB": _png(8, 8, 0, b"", (b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 1))),
        "PNG with a chunk of 2 GB": _png(8, 8)[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT",
        "PNG, cut off": _png(64, 64, data=zlib.compress(np.random.default_rng(0).bytes(64 * 65)))[:2000],
        "BMP of 4 Gpixels": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 65_536, 65_536, 1, 24, 0, 0, 0, 0, 0, 0),
        "BMP of a negative height": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 20_000, -(2**31) + 1, 1, 24, 0, 0, 0, 0, 0, 0),
        "PPM of 4 Gpixels": _ppm(65_536, 65_536),
        "PPM of 10**18 pixels a side": _ppm(10**18, 10**18),
        "PPM whose header does not end": b"P6 " + b"#" * 100_000,
        "TIFF of 4 Gpixels": _tiff(65_536, 65_536),
        "TIFF whose folders form a circle": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "TIFF of 65535 entries": b"II*\0\x08\0\0\0\xff\xff" + bytes(12) * 100,
        "WebP of 268 million pixels": b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0/\xff\xff\xff\x0f" + bytes(16),
        "WebP animation of 2**48 pixels": b"RIFF\x2e\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\xff\xff\xff\xff\xff\xff"
        + bytes(20),
        "JPEG of 4 Gpixels": b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03\x01\x11\0\x02\x11\0\x03\x11\0"
        + b"\xff\xd9",
        "JPEG of no components": b"\xff\xd8\xff\xc0\0\x08\x08\0\x08\0\x08\0\xff\xd9",
        "EPS (Ghostscript)": _EPS,
        "EPS behind a preview": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(_EPS)) + bytes(20) + _EPS,
        "PDF": b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch/F(touch)>>>>endobj\n%%EOF",
        "SVG": _SVG,
        "GIF": _saved("GIF"),
        "GIF of 65535 frames": _saved("GIF")[:-1] + b"!\xf9\x04\0\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\0" * 1000,
        "ICO": _saved("ICO"),
        "ICNS": b"icns" + struct.pack(">I", 1000) + b"ic10" + struct.pack(">I", 2**31),
        "TGA": _saved("TGA"),
        "PCX": _saved("PCX"),
        "SGI": _saved("SGI"),
        "DDS": _saved("DDS"),
        "PSD": b"8BPS\0\x01" + bytes(6) + b"\0\x03" + struct.pack(">II", 30_000, 30_000) + b"\0\x08\0\x03" + bytes(100),
        "FITS": b"SIMPLE  =                    T".ljust(80)
        + b"NAXIS   =                    2".ljust(80)
        + b"END".ljust(2720),
        "XPM": b'/* XPM */\nstatic char *a[] = {\n"99999 99999 1 1",\n"a c #000000",\n',
        "WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "MPEG": b"\0\0\x01\xb3" + bytes(100),
        "a pickle": SYSTEM,
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x14ftypjp2 " + bytes(100),
        "a pipe": _STRANGE["a pipe"],
        "endless, by a link": _STRANGE["endless, by a link"],
    }
    for name, content in table.items():
        yield Attack("images", name, lambda path: read_image(path, 64), "0.jpg", content)
    for name in ("PNG of 169 million pixels", "EPS (Ghostscript)", "GIF", "TIFF of 4 Gpixels", "a pipe"):
        yield Attack(
            "images",
            f"{name} (in evaluation)",
            lambda path: _all_images(path.parent),
            "0.png",
            table[name],
        )
        yield Attack(
            "images",
            f"{name} (among samples)",
            lambda path: SampleFolder(path.parent, 1)._read(0),
            "000000.png",
            table[name],
        )


def _tiff(width: int, height: int) -> bytes:
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 8),
        (262, 3, 1),
        (273, 4, 200),
        (278, 4, height),
    ]
    entries += [(279, 4, 100)]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in entries)
    return (b"II*\0" + struct.pack("<I", 8) + body + bytes(4)).ljust(200, b"\0") + zlib.compress(bytes(100))


# Captions and other texts


def captions() -> Iterator[Attack]:
    names = {
        "above": "../secret.txt",
        "above, in between": "a/../../secret.txt",
        "absolute": "/etc/passwd",
        "nothing": "",
        "with a zero byte": "a\0.jpg",
        "with a new line": "a\nb.jpg",
        "half a character": "\ud800.jpg",
        "a number": 7,
    }
    for name, file in names.items():
        content = {"images": [{"id": 1, "file_name": file}], "annotations": [{"image_id": 1, "caption": "a"}]}
        yield Attack("captions", f"an image {name}", read_captions, "captions.json", json.dumps(content).encode())
    for name, number in {"of 10**30": 10**30, "of -1": -1, "of true": True, "of a list": [1]}.items():
        content = {"images": [{"id": number, "file_name": "a"}], "annotations": []}
        yield Attack("captions", f"a number {name}", read_captions, "captions.json", json.dumps(content).encode())
    table = "sampler,steps\n" + "x" * 200_000
    yield Attack("captions", "a table with a field of 200 KB", Table, "sweep.csv", table.encode())
    for name in ("a pipe", "endless, by a link", "20 GB of nothing"):
        yield Attack("captions", f"{name} for prompts", read_prompts_file, "prompts.txt", _STRANGE[name])


# Folders of VAEs, text encoders, tokenizers


def _copy_of(folder: Path, change: Callable[[Path], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        shutil.copytree(folder, path.parent, dirs_exist_ok=True)
        for file in path.parent.iterdir():
            file.chmod(0o644)
        change(path)

    return write


def _with_json(**values) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | values))

    return change


def _write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


_VOCABULARY = {"[UNK]": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "a</w>": 3}
_CLIP = {
    "vocab_size": 4,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 8,
}


def _tokenizer_with(name: str, content: Content) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        folder = path.parent
        (folder / "vocab.json").write_text(json.dumps(_VOCABULARY))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        target = folder / name
        target.unlink(missing_ok=True)
        content(target) if callable(content) else target.write_bytes(content)

    return write


def _text_encoder_with(**values) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(json.dumps(_CLIP | values))
        (path.parent / "model_state.pdparams").write_bytes(pickled({"a": numpy_array()}))

    return write


_TRANSFORMER = {
    "_class_name": "Transformer2DModel",
    "norm_type": "ada_norm_zero",
    **{key: value for key, value in CONFIG.to_dict().items() if key not in ("num_classes", "mlp_ratio")},
}


def model_folders() -> Iterator[Attack]:
    vae = DATA / "vae" / "vae_tiny"

    def read_vae(path: Path) -> None:
        load_vae(str(path.parent))

    changes = {
        "10**9 layers a block": {"layers_per_block": HUGE},
        "10**6 channels": {"block_out_channels": [10**6, 10**6]},
        "10**5 blocks": {"block_out_channels": [16] * 10**5, "down_block_types": ["DownEncoderBlock2D"] * 10**5},
        "10**9 latent channels": {"latent_channels": HUGE},
        "blocks of another class": {"down_block_types": ["os.system"] * 2},
        "another activation": {"act_fn": "__import__('os')"},
        "channels of text": {"block_out_channels": "ab"},
    }
    for name, values in changes.items():
        yield Attack("model folders", f"a VAE of {name}", read_vae, "config.json", _copy_of(vae, _with_json(**values)))
    code = {"auto_map": {"AutoModel": "evil.Model"}, "_class_name": ["evil", "Model"], "custom_code": "evil.py"}

    def add_code(path: Path) -> None:
        _with_json(**code)(path)
        path.with_name("evil.py").write_text(TOUCH)
        path.with_name("__init__.py").write_text(TOUCH)

    yield Attack("model folders", "a VAE with code", read_vae, "config.json", _copy_of(vae, add_code), is_read=False)
    weights = "diffusion_pytorch_model.safetensors"
    for name, content in {"a pickle": SYSTEM, "a torch pickle": torch_file(SYSTEM)}.items():
        yield Attack("model folders", f"a VAE of {name}", read_vae, weights, _copy_of(vae, _write(content)))
        yield Attack(
            "model folders",
            f"a VAE with {name} that goes first",
            read_vae,
            "model_state.pdparams",
            _copy_of(vae, _write(content)),
        )

    def read_text(path: Path) -> None:
        load_text_encoder(str(path.parent))

    for name, values in {
        "10**12 words": {"vocab_size": 10**12},
        "10**9 layers": {"num_hidden_layers": HUGE},
        "10**9 values a word": {"hidden_size": HUGE},
        "10**9 positions": {"max_position_embeddings": HUGE},
        "an MLP of 10**9": {"intermediate_size": HUGE},
        "another activation": {"hidden_act": "os.system"},
        "settings in a number": {"init_args": 7},
        "layers of text": {"num_hidden_layers": "x"},
    }.items():
        content = _text_encoder_with(**values)
        yield Attack("model folders", f"a text encoder of {name}", read_text, "config.json", content)
    content = _text_encoder_with(auto_map={"AutoModel": "evil.Model"}, architectures=["os.system"])
    yield Attack("model folders", "a text encoder with code", read_text, "config.json", content, named="inside")

    def read_tokenizer(path: Path) -> None:
        load_tokenizer(str(path.parent), 12)

    for name, values in {
        "another class": {"tokenizer_class": "os.system"},
        "a class that is a list": {"tokenizer_class": ["evil", "Tokenizer"]},
        "tokens that are numbers": {"added_tokens_decoder": {"0": 7}},
        "a token of no kind": {"unk_token": {"__type": "evil"}},
    }.items():
        content = _tokenizer_with("tokenizer_config.json", json.dumps(values).encode())
        yield Attack(
            "model folders", f"a tokenizer of {name}", read_tokenizer, "tokenizer_config.json", content, named="inside"
        )
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% set x = 'a' * 10000000000 %}"
    for name, file, values in (
        ("a template", "tokenizer_config.json", {"chat_template": template}),
        ("a vocabulary elsewhere", "tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
        ("special tokens elsewhere", "tokenizer_config.json", {"special_tokens_map_file": "/etc/passwd"}),
        (
            "a tokenizer elsewhere",
            "tokenizer_config.json",
            {"tokenizer_file": "/etc/passwd", "auto_map": {"x": "evil.T"}},
        ),
    ):
        content = _tokenizer_with(file, json.dumps(values).encode())
        yield Attack("model folders", f"a tokenizer with {name}", read_tokenizer, "vocab.json", content, is_read=False)
    for name, file, content in (
        ("words that are a list", "vocab.json", b"[1]"),
        ("deep words", "vocab.json", b"[" * 100_000),
        ("words through a pipe", "vocab.json", _STRANGE["a pipe"]),
        ("endless words", "vocab.json", _STRANGE["endless, by a link"]),
        ("endless merges", "merges.txt", _STRANGE["endless, by a link"]),
        ("endless special tokens", "special_tokens_map.json", _STRANGE["endless, by a link"]),
        ("endless added tokens", "added_tokens.json", _STRANGE["endless, by a link"]),
        ("added tokens that are a list", "added_tokens.json", b"[1]"),
    ):
        content = _tokenizer_with(file, content)
        yield Attack("model folders", f"a tokenizer of {name}", read_tokenizer, "vocab.json", content, named="inside")
    content = _tokenizer_with("chat_template.json", json.dumps({"chat_template": template}).encode())
    yield Attack(
        "model folders", "a tokenizer with templates", read_tokenizer, "vocab.json", content, "chat_template.json"
    )
    index = {"_class_name": ["evil", "P"], "transformer": ["os", "system"], "vae": ["../../../x", "Y"]}

    def pipeline(path: Path) -> None:
        path.write_text(json.dumps(index))
        (path.parent / "transformer").mkdir()
        (path.parent / "transformer" / "model_state.pdparams").write_bytes(SYSTEM)

    def read_pipeline(path: Path) -> None:
        load_dit(path.parent)

    yield Attack(
        "model folders", "a pipeline of foreign modules", read_pipeline, "model_index.json", pipeline, "transformer"
    )
    for name, values in {
        "of another class": {"_class_name": "os.system"},
        "of no class": {"_class_name": {"a": 1}},
        "of 10**9 layers": _TRANSFORMER | {"num_layers": HUGE},
        "of a latent of 10**6": _TRANSFORMER | {"sample_size": 2**20},
    }.items():

        def component(path: Path, values: dict = values) -> None:
            path.write_text(json.dumps(values))
            path.with_name("model_state.pdparams").write_bytes(_checkpoint_files()["model_state.pdparams"])

        yield Attack("model folders", f"a transformer {name}", read_pipeline, "config.json", component)


# Datasets of captioned images


def _captioned(change: Callable[[Path], object], file: str = "train.parquet") -> Callable[[Path], None]:
    """Writes a dataset of one image, in parquet or with metadata, before the change."""

    def write(path: Path) -> None:
        folder = path.parent
        if file.endswith(".parquet"):
            _parquet(folder / file, {"image": [_PIXEL.getvalue()], "text": ["a"]})
        else:
            (folder / "0.png").write_bytes(_PIXEL.getvalue())
            (folder / file).write_text(json.dumps({"file_name": "0.png", "text": "a"}) + "\n")
        change(path)

    return write


_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def _parquet(path: Path, columns: dict, dictionaries: bool = True, **metadata: str) -> None:
    table = pa.table(columns).replace_schema_metadata(metadata)
    parquet.write_table(table, path, compression="zstd", use_dictionary=dictionaries, write_statistics=False)


def _read_dataset(path: Path) -> None:
    images = open_dataset(str(path.parent), None, None)
    images.image(0)


def _repeated(value: bytes | str, count: int = 10**5) -> pa.Array:
    """A value many times, which takes a few bytes more than once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), [value])


def _replaced_by(content: Content) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.unlink(missing_ok=True)
        content(path) if callable(content) else path.write_bytes(content)

    return write


# A column that makes a file long enough for its rows.
_NOISE = np.random.default_rng(0).random(2 * 10**5).view("S16").tolist()


def _configs(setting: str) -> bytes:
    """The README.md of a dataset of one configuration."""
    return f"---\nconfigs:\n- config_name: default\n  {setting}\n---\n".encode()


def datasets() -> Iterator[Attack]:
    png = _PIXEL.getvalue()
    features = {"image": {"_type": "os.system"}, "text": {"dtype": "string", "_type": "Value"}}
    hostile = json.dumps({"info": {"features": features}})
    table: dict[str, Callable[[Path], object]] = {
        "10**7 rows of nothing": lambda path: _parquet(
            path, {"image": pa.nulls(10**7, "binary"), "text": pa.nulls(10**7, "string")}
        ),
        "one image 100,000 times": lambda path: _parquet(
            path, {"image": _repeated(bytes(10**5)), "text": _repeated("a")}
        ),
        "one image 100,000 times, and noise": lambda path: _parquet(
            path, {"image": _repeated(bytes(10**5)), "text": _repeated("a"), "noise": _NOISE}
        ),
        "an image of 50 MB of zeros 64 times": lambda path: _parquet(
            path, {"image": _repeated(bytes(50_000_000), 64), "text": _repeated("a", 64), "noise": _NOISE[:64]}
        ),
        "an image of 300 MB of zeros": lambda path: _parquet(
            path, {"image": [bytes(300_000_000)], "text": ["a"]}, False
        ),
        "features of another class": lambda path: _parquet(path, {"image": [png], "text": ["a"]}, huggingface=hostile),
        "deep features": lambda path: _parquet(path, {"image": [png], "text": ["a"]}, huggingface="[" * 100_000),
        "an image elsewhere": lambda path: _parquet(
            path, {"image": pa.array([{"bytes": None, "path": "../secret.txt"}], _IMAGE), "text": ["a"]}
        ),
        "a pipe": _replaced_by(_STRANGE["a pipe"]),
        "endless, by a link": _replaced_by(_STRANGE["endless, by a link"]),
        "20 GB of nothing": _replaced_by(_STRANGE["20 GB of nothing"]),
        "EPS (Ghostscript)": lambda path: _parquet(path, {"image": [_EPS], "text": ["a"]}),
    }
    for name, change in table.items():
        yield Attack("datasets", name, _read_dataset, "train.parquet", _captioned(change), named="inside")
    laughs = "x: &a [a, a, a, a, a, a, a, a, a]\n" + "".join(
        f"{chr(letter)}: &{chr(letter)} [{', '.join([f'*{chr(letter - 1)}'] * 9)}]\n" for letter in range(98, 112)
    )
    cards = {
        "a billion laughs": f"---\n{laughs}configs: *o\n---\n".encode(),
        "laughs for features": f"---\n{laughs}dataset_info:\n  features: *o\n---\n".encode(),
        "deep lists": b"---\nconfigs: " + b"[" * 5_000 + b"\n---\n",
        "files on the network": _configs("data_files: http://127.0.0.1:9/x.parquet"),
        "files on the network by splits": _configs(
            "data_files: [{split: train, path: [http://127.0.0.1:9/x.parquet]}]"
        ),
        "files on the hub": _configs("data_files: hf://datasets/owner/some/*.parquet"),
        "files by two protocols": _configs("data_files: simplecache::file:///etc/*.parquet"),
        "a call": b"---\nconfigs: !!python/object/apply:os.system ['touch code-was-run']\n---\n",
        "20 GB of nothing": _STRANGE["20 GB of nothing"],
        "a pipe": _STRANGE["a pipe"],
        "endless, by a link": _STRANGE["endless, by a link"],
    }
    for file in ("README.md", ".huggingface.yaml", "dataset_infos.json"):
        for name, content in cards.items():
            if isinstance(content, bytes) and file == "dataset_infos.json":
                continue
            if isinstance(content, bytes) and file != "README.md":
                content = content.removeprefix(b"---\n").removesuffix(b"---\n")
            write = _captioned(_replaced_by(content))
            yield Attack("datasets", f"{name} in {file}", _read_dataset, file, write, named="inside")
    write = _captioned(_replaced_by(b'{"a": ' + b"[" * 100_000))
    yield Attack(
        "datasets", "deep lists in dataset_infos.json", _read_dataset, "dataset_infos.json", write, named="inside"
    )
    lines: dict[str, Content] = {
        "a file above": b'{"file_name": "../secret.txt", "text": "a"}',
        "a file of the system": b'{"file_name": "/etc/passwd", "text": "a"}',
        "a file on the network": b'{"file_name": "http://127.0.0.1:9/0.png", "text": "a"}',
        "deep lists": b'{"file_name": "0.png", "text": ' + b"[" * 1_000_000,
        "a line of 20 GB": _STRANGE["20 GB of nothing"],
        "a pipe": _STRANGE["a pipe"],
        "endless, by a link": _STRANGE["endless, by a link"],
    }
    for name, content in lines.items():
        yield Attack(
            "datasets",
            f"{name} in metadata.jsonl",
            _read_dataset,
            "metadata.jsonl",
            _captioned(_replaced_by(content), "metadata.jsonl"),
            named="inside",
        )


# Pipelines of Stable Diffusion XL


@functools.cache
def _pipeline() -> Path:
    """The folder of a tiny one, made once, which this process removes at its end."""
    folder = Path(tempfile.mkdtemp(prefix="pipeline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_pipeline(folder / "pipeline", ["a cat"])
    return folder / "pipeline"


def _pipeline_with(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Writes a pipeline into the folder above that of the file, before the change."""

    def write(path: Path) -> None:
        shutil.copytree(_pipeline(), path.parents[1], dirs_exist_ok=True)
        change(path)

    return write


def pipelines() -> Iterator[Attack]:
    def read_unet(path: Path) -> None:
        load_unet(str(path.parents[1]))

    for key, value in {
        "block_out_channels": [10**6, 10**6],
        "layers_per_block": HUGE,
        "transformer_layers_per_block": HUGE,
        "cross_attention_dim": HUGE,
        "attention_head_dim": 0,
        "in_channels": HUGE,
        "down_block_types": ["os.system"] * 2,
        "mid_block_type": "__import__('os')",
        "act_fn": "os.system",
    }.items():
        content = _pipeline_with(_with_json(**{key: value}))
        yield Attack(
            "pipelines", f"a UNet of {key} {str(value):.20}", read_unet, "unet/config.json", content, named="inside"
        )
    blocks = {"block_out_channels": [32] * 10**5, "down_block_types": ["DownBlock2D"] * 10**5}
    blocks |= {"up_block_types": ["UpBlock2D"] * 10**5, "attention_head_dim": 2, "transformer_layers_per_block": 1}
    content = _pipeline_with(_with_json(**blocks))
    yield Attack("pipelines", "a UNet of 10**5 blocks", read_unet, "unet/config.json", content)
    for name, written in {"a pickle": SYSTEM, "a torch pickle": torch_file(SYSTEM)}.items():
        content = _pipeline_with(_write(written))
        yield Attack("pipelines", f"a UNet of {name}", read_unet, "unet/model_state.pdparams", content)

    def read_encoders(path: Path) -> None:
        TextEncoders.load(str(path.parents[1]))

    for part, key in (("text_encoder", "vocab_size"), ("text_encoder_2", "projection_dim")):
        content = _pipeline_with(_with_json(**{key: HUGE}))
        yield Attack("pipelines", f"a {part} of {key} 10**9", read_encoders, f"{part}/config.json", content)

    def read_scheduler(path: Path) -> None:
        load_noise_schedule(str(path.parents[1]))
        load_scheduler(str(path.parents[1]))

    for name, values in {
        "of another class": {"_class_name": "os.system"},
        "of a class of no scheduler": {"_class_name": "StableDiffusionXLPipeline"},
        "of a class in a list": {"_class_name": ["ppdiffusers", "EulerDiscreteScheduler"]},
        "of 10**12 steps": {"num_train_timesteps": 10**12},
        "of betas of text": {"trained_betas": "os.system"},
        "of betas without end": {"beta_end": 1e300},
        "of betas that are lists": {"trained_betas": [[[]]] * 10_000},
        "of another schedule": {"beta_schedule": "os.system"},
        "that predicts something else": {"prediction_type": "os.system"},
    }.items():
        content = _pipeline_with(_with_json(**values))
        yield Attack("pipelines", f"a scheduler {name}", read_scheduler, "scheduler/scheduler_config.json", content)
    for name in ("deep lists", "a pipe", "endless, by a link"):
        content = _pipeline_with(_replaced_by((_JSON | _STRANGE)[name]))
        file = "scheduler/scheduler_config.json"
        yield Attack(
            "pipelines", f"a scheduler of {name}", read_scheduler, file, content, named="scheduler_config.json"
        )
        yield Attack(
            "pipelines",
            f"an index of {name}",
            lambda path: zeros_for_empty_prompt(str(path.parent)),
            "model_index.json",
            (_JSON | _STRANGE)[name],
        )
    for name in ("paddle_lora_weights.pdparams", "pytorch_lora_weights.bin"):
        yield Attack("pipelines", f"system in {name}", lambda path: read_lora(path.parent), name, SYSTEM)
    sides = {f"unet.{'a.' * 200_000}to_q.lora.{side}.weight": numpy_array((2, 2)) for side in ("down", "up")}
    yield Attack("pipelines", "a LoRA of long names", read_lora, "lora.pdparams", pickled(sides))
