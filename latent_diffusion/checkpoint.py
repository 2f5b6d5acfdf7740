"""The checkpoint folder: what it holds, how it is found, and the state that goes into it.

    output_dir/checkpoint-N/
        model_state.pdparams  ema_state.pdparams  optimizer.pdopt  scheduler.pdparams  scaler.pdparams
        rng_state*.pth  trainer_state.json  training_args.bin  config.json
        manifest.json    step, samples and seed of the run, size and SHA-256 of every other file
    output_dir/best/
        model_state.pdparams  ema_state.pdparams  config.json  evaluation.json

A folder of such a name is complete: it is written under another name, with the manifest last, and renamed. What a disk
did to it later shows in sizes and checksums. All state is read without executing anything from the files.
"""

import contextlib
import itertools
import random
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from . import distributed
from .ema import EMA
from .errors import InputError
from .files import file_sha256, publish_folder, sync, write_json
from .reading import read_json
from .weights import read_paddle, read_weights, write_paddle

MODEL, EMA_MODEL, CONFIG = "model_state.pdparams", "ema_state.pdparams", "config.json"
OPTIMIZER, SCHEDULER, SCALER = "optimizer.pdopt", "scheduler.pdparams", "scaler.pdparams"
TRAINER_STATE, TRAINING_ARGUMENTS = "trainer_state.json", "training_args.bin"
MANIFEST, MANIFEST_VERSION = "manifest.json", 1

# The weights that evaluation during training found best, and the file that says how good they are.
BEST, EVALUATION = "best", "evaluation.json"

_NAME = re.compile(r"checkpoint-(\d+)")


class SaveFailed(InputError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass(frozen=True)
class Progress:
    """How far a run had come when it wrote a checkpoint, and what the rest of it depends on.

    Attributes:
        step: optimizer steps made.
        samples: samples consumed by them, on all processes.
        seed: of data order and noise.
    """

    step: int
    samples: int
    seed: int

    def changes(self, samples_per_step: int, seed: int) -> list[str]:
        """Sentences about what is different in a run that goes on from here."""
        notes = []
        if self.samples != self.step * samples_per_step:
            notes.append("other samples a step than before: the order of data changes from here on")
        if self.seed != seed:
            notes.append(f"seed {seed}, before it was {self.seed}: the order of data and all noise change from here on")
        return notes


def read_progress(folder: Path) -> Progress:
    """How far the run of a checkpoint had come.

    Raises:
        InputError: its manifest cannot be read.
    """
    manifest = _read_manifest(folder)
    return Progress(**{name: manifest[name] for name in ("step", "samples", "seed")})


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no {MANIFEST}: it is not a complete checkpoint, or of a version before manifests"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({type(error).__name__}: {error})") from None
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
        raise InputError(f"{path} is not the manifest of a checkpoint that this version reads")
    files = manifest.get("files")
    numbers = [manifest.get(name) for name in ("step", "samples", "seed")]
    if not all(type(number) is int and number >= 0 for number in numbers) or not _are_files(files):
        raise InputError(f"{path} is damaged: it has not all that a manifest says")
    return manifest


def _are_files(files: object) -> bool:
    return isinstance(files, dict) and all(
        Path(name).name == name and isinstance(entry, dict) and type(entry.get("bytes")) is int
        for name, entry in files.items()
    )


def write_manifest(folder: Path, progress: Progress) -> None:
    """Writes down what a checkpoint consists of, all its other files being there."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())
    }
    write_json(folder / MANIFEST, {"version": MANIFEST_VERSION, **asdict(progress), "files": files})


def check_whole(folder: Path) -> None:
    """Raises `InputError` unless all files of a checkpoint are there in the sizes of its manifest; it reads none."""
    manifest = _read_manifest(folder)
    if (name := _NAME.fullmatch(folder.name)) and int(name[1]) != manifest["step"]:
        raise InputError(
            f"{folder} is of step {manifest['step']}: name it checkpoint-{manifest['step']}, or move it away"
        )
    for name, entry in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read ({error.strerror}), which the manifest lists") from None
        if size != entry["bytes"]:
            raise InputError(f"{folder / name} has {size} bytes, not {entry['bytes']}: it is damaged")


def verify(folder: Path) -> None:
    """Raises `InputError` unless all files of a checkpoint are those that were written: it reads them all."""
    check_whole(folder)
    for name, entry in _read_manifest(folder)["files"].items():
        try:
            digest = file_sha256(folder / name)
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read ({error.strerror})") from None
        if digest != entry.get("sha256"):
            raise InputError(f"{folder / name} is not what was written (its checksum differs): it is damaged")


def check_weights_file(folder: Path) -> None:
    """As `check_whole`, but a checkpoint of another program, without a manifest, will do if it has weights."""
    if (folder / MANIFEST).is_file():
        check_whole(folder)
    elif not (folder / MODEL).is_file():
        raise InputError(f"{folder} has neither {MANIFEST} nor {MODEL}: it is not a complete checkpoint")


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders below `output_dir` that are named as checkpoints, by rising step; they may be damaged."""
    if not output_dir.is_dir():
        return []
    return sorted((path for path in output_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, perhaps a damaged one: it is named as one, or has a manifest."""
    return folder.is_dir() and (_NAME.fullmatch(folder.name) is not None or (folder / MANIFEST).is_file())


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def newest_checkpoint(output_dir: Path, check: Callable[[Path], None] = check_whole) -> Path | None:
    """The checkpoint of the highest step that is complete, or None where there are no checkpoints.

    Args:
        output_dir: of a run.
        check: raises `InputError` for a folder that is passed over, which is said on stderr.

    Raises:
        InputError: there are checkpoints, and none is complete.
    """
    damaged = []
    for folder in reversed(checkpoints(output_dir)):
        try:
            check(folder)
        except InputError as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            print(f"warning: skipped a checkpoint: {text}", file=sys.stderr)
        return folder
    if damaged:
        raise InputError(
            f"none of the {len(damaged)} checkpoints in {output_dir} is complete ({damaged[0]}); move them away to "
            "start anew"
        )
    return None


def agreed(folder: Path | None) -> Path | None:
    """The checkpoint that the first process has chosen. All processes call it.

    Args:
        folder: the choice of the first process, None for no checkpoint; of other processes anything.

    Raises:
        InputError: on all processes, where one of them does not find the same checkpoint there.
    """
    chosen = distributed.from_first(str(folder) if folder else "")
    if not chosen:
        return None
    manifests = distributed.gather(_manifest_text(Path(chosen)))
    for rank, text in enumerate(manifests):
        if text != manifests[0]:
            raise InputError(
                f"process {rank} does not find the checkpoint {chosen} as process 0 does; the folder must be on a disk "
                "that all machines share"
            )
    return Path(chosen)


def check_shared(folder: Path) -> None:
    """Raises `InputError` on all processes unless all write into the same folder `folder`. All processes call it.

    On disks that are not shared each machine would keep a part of every checkpoint.
    """
    rank, world_size = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    if world_size == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f".process-{rank}"
    own.write_text(distributed.from_first(uuid.uuid4().hex))
    distributed.barrier()
    missing = [r for r in range(world_size) if not _has_text(folder / f".process-{r}", own.read_text())]
    reports = distributed.gather(",".join(map(str, missing)))
    own.unlink()
    if others := reports[0]:
        raise InputError(
            f"process {others} does not write into the folder {folder} that process 0 writes into; it must be on a "
            "disk that all machines share"
        )


def _has_text(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def check_has(folder: Path, name: str, advice: str) -> None:
    """Raises `InputError` with this advice unless a checkpoint has the file `name`."""
    if name not in _read_manifest(folder)["files"]:
        raise InputError(f"{folder} has no {name}: {advice}")


def _manifest_text(folder: Path) -> str:
    try:
        return (folder / MANIFEST).read_text(encoding="utf-8")
    except OSError:
        return ""


def remove_older(newest: Path, keep: int | None) -> None:
    """Deletes complete checkpoints of steps before `newest`, so that `keep` are left with it; None keeps all.

    Damaged ones do not count, and are left where they are.
    """
    older = [path for path in checkpoints(newest.parent) if _step(path) < _step(newest) and _is_whole(path)]
    for path in older[: max(len(older) + 1 - keep, 0)] if keep else []:
        # Under this name what a killed process leaves of it is no checkpoint, and is removed by the next run.
        removed = path.rename(path.with_name(f".{path.name}.partial"))
        shutil.rmtree(removed)


def _is_whole(folder: Path) -> bool:
    try:
        check_whole(folder)
    except InputError:
        return False
    return True


def set_aside(output_dir: Path, after: int = -1) -> str | None:
    """Moves what is of steps beyond `after` to a folder of its own, so that a new run's cannot mix with it.

    Checkpoints, and the best weights.

    Returns:
        A sentence about what was moved to `output_dir/overwritten-N`, or None when there was nothing to move.

    Raises:
        InputError: the best weights do not say of which step they are.
    """
    best = read_best(output_dir)
    kinds = {
        "checkpoints": [path for path in checkpoints(output_dir) if _step(path) > after],
        f"the best weights ({BEST})": [output_dir / BEST] if best is not None and best["step"] > after else [],
    }
    found = [name for name, paths in kinds.items() if paths]
    if not found:
        return None
    numbers = [int(path.name.removeprefix("overwritten-")) for path in output_dir.glob("overwritten-[0-9]*")]
    folder = output_dir / f"overwritten-{max(numbers, default=0) + 1}"
    folder.mkdir()
    for path in itertools.chain.from_iterable(kinds.values()):
        path.rename(folder / path.name)
    return f"{' and '.join(found)} of an earlier run were moved to {folder}"


def read_best(output_dir: Path) -> dict | None:
    """What is known of the best weights so far: "step", their distance "fid" and more; None where there are none.

    Raises:
        InputError: the file that says so cannot be read.
    """
    path = output_dir / BEST / EVALUATION
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        return found | {"step": int(found["step"]), "fid": float(found["fid"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not say how good the weights beside it are ({type(error).__name__}: {error}); move the "
            "folder away"
        ) from None


def save(
    final: Path,
    write: Callable[[Path], None],
    progress: Progress,
    size: Callable[[], int],
    keep: int | None = None,
) -> None:
    """Lets all processes together `write` into a temporary folder, which then becomes the checkpoint `final`.

    All processes call it; afterwards older ones are deleted, see `remove_older`.

    Args:
        final: the folder.
        write: writes this process's files into a folder.
        progress: how far the run has come.
        size: gives the bytes that this process writes, about; it is said when that fails.
        keep: see `remove_older`.

    Raises:
        SaveFailed: on all processes, where one of them could not write; nothing of the new checkpoint is left.
    """
    first = paddle.distributed.get_rank() == 0
    staging = final.with_name(f".{final.name}.partial")
    if first:
        shutil.rmtree(staging, ignore_errors=True)
    distributed.barrier()
    failures = distributed.gather(_failure(lambda: _write_into(staging, write)))
    failure = next(filter(None, failures), "")
    if first and not failure:
        failure = _failure(lambda: _publish(staging, final, progress))
    if failure := distributed.from_first(failure):
        needed = sum(map(int, distributed.gather(str(size()))))
        if first:
            shutil.rmtree(staging, ignore_errors=True)
        raise SaveFailed(f"cannot save {final} ({failure}); it needs {needed / 1e6:.1f} MB, {_free(final.parent)}")
    if first and (failure := _failure(lambda: remove_older(final, keep))):
        print(f"warning: cannot delete an old checkpoint ({failure})", file=sys.stderr)


@contextlib.contextmanager
def going_on(say: Callable[[str], None], is_last: bool) -> Iterator[None]:
    """Around a save during training: where it fails that is said and the run goes on, but not after the last one."""
    try:
        yield
    except SaveFailed as error:
        if is_last:
            raise
        say(f"warning: {error}; training goes on, and saves again at the next time")


def _failure(act: Callable[[], None]) -> str:
    """What the system said when `act` failed, or an empty text."""
    try:
        act()
    except OSError as error:
        return f"{error.strerror or error}: {Path(error.filename).name}" if error.filename else str(error)
    return ""


def _write_into(staging: Path, write: Callable[[Path], None]) -> None:
    staging.mkdir(parents=True, exist_ok=True)
    write(staging)


def _publish(staging: Path, final: Path, progress: Progress) -> None:
    for path in staging.iterdir():
        sync(path)
    write_manifest(staging, progress)
    publish_folder(staging, final)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free"
    except OSError as error:
        return f"{folder} cannot be asked for its free space ({error.strerror})"


def remove_partial(output_dir: Path) -> None:
    """Removes what interrupted saves left behind."""
    for path in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(path)


def write_state(folder: Path, model: paddle.nn.Layer, ema: EMA | None, lr_scheduler, scaler) -> None:
    """Writes what every process has alike: weights, their average, configuration, schedule and loss scale.

    Args:
        folder: from `save`.
        model: its `config` has `save`.
        scaler: a `paddle.amp.GradScaler`, or None where the loss is not scaled.
    """
    write_weights(folder, model, ema)
    write_paddle(folder / SCHEDULER, lr_scheduler.state_dict())
    if scaler is not None:
        write_paddle(folder / SCALER, scaler.state_dict())


def write_weights(folder: Path, model: paddle.nn.Layer, ema: EMA | None) -> None:
    """Writes what sampling and conversion need: weights, their average and the configuration; see `write_state`.

    And, where a model has `export_weights(folder, weights)`, what that writes: the average, or else the weights, as
    other programs read them.
    """
    write_paddle(folder / MODEL, model.state_dict())
    if ema is not None:
        write_paddle(folder / EMA_MODEL, ema.state_dict())
    model.config.save(folder / CONFIG)
    if hasattr(model, "export_weights"):
        model.export_weights(folder, (ema or model).state_dict())


def read_averaged_weights(folder: Path, model: paddle.nn.Layer, ema: EMA | None) -> None:
    """Sets the weights of a checkpoint and of their average.

    Raises:
        InputError: a file cannot be read, or is of another model.
    """
    load_weights(folder / MODEL, model)
    if ema is not None:
        with _restoring(folder / EMA_MODEL) as state:
            ema.set_state_dict(state)


def read_schedule(folder: Path, lr_scheduler, scaler) -> None:
    """Restores the learning rate schedule and the loss scale of a checkpoint."""
    with _restoring(folder / SCHEDULER) as state:
        lr_scheduler.set_state_dict(state)
        # The state has the earlier run's learning rate, which would hold for one step more than the flags say.
        lr_scheduler.step(lr_scheduler.last_epoch)
    if scaler is not None:
        with _restoring(folder / SCALER) as state:
            scaler.load_state_dict(state)


@contextlib.contextmanager
def _restoring(path: Path) -> Iterator[Any]:
    """Around setting the state in a file, which it gives; a file that holds something else makes Paddle raise anything.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    state = read_paddle(path)
    try:
        yield state
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} does not hold the state of such a run: {type(error).__name__} {reason}") from error


def check_config(folder: Path, config) -> None:
    """Raises `InputError` unless the checkpoint is of a model of this configuration; the message names the key."""
    saved = type(config).from_json(folder / CONFIG).to_dict()
    for key, value in config.to_dict().items():
        if saved[key] != value:
            raise InputError(
                f"{folder} is of a model with {key} {saved[key]!r}, not {value!r}; give its configuration, or "
                "another output folder"
            )


def size_of(state: dict) -> int:
    """Bytes of the tensors of a state dict, which may be nested."""
    return sum(
        size_of(value) if isinstance(value, dict) else value.size * value.element_size()
        for value in state.values()
        if isinstance(value, dict | paddle.Tensor)
    )


def load_weights(path: Path, model: paddle.nn.Layer) -> None:
    """Sets all weights of `model` from a weight file in Paddle's layout; they keep the model's dtypes.

    Raises:
        InputError: the file cannot be read, or its weights are not those of the model.
    """
    set_weights(model, read_weights(path), path)


def set_weights(model: paddle.nn.Layer, weights: dict[str, np.ndarray], source: Path) -> None:
    """Sets all weights of `model`; `source` names them in errors.

    Raises:
        InputError: the weights are not those of the model.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise InputError(f"{source} lacks the weight {name}: it belongs to another model")
        if list(weights[name].shape) != tensor.shape:
            found, expected = list(weights[name].shape), list(tensor.shape)
            raise InputError(f"{name} in {source} has shape {found}, the model's has {expected}")
    if unknown := sorted(set(weights) - set(own)):
        raise InputError(f"{source} has the weight {unknown[0]}, which the model has not: it belongs to another model")
    # One after the other: copies of all would take the memory of the weights once more.
    for name, tensor in own.items():
        tensor.set_value(paddle.to_tensor(weights[name]).astype(tensor.dtype))  # the reader gives float32 for bfloat16


def save_optimizer(path: Path, optimizer, model: paddle.nn.Layer) -> None:
    """Writes the optimizer's state, keyed by the model's weight names.

    Paddle keys it by parameter names, which count the layers that were created in a process: with those, building
    one layer more before the model (a VAE, say) would make a resumed run miss its own state without a word.
    """
    names = {p.name: name for name, p in model.named_parameters()}
    write_paddle(path, _rename(optimizer.state_dict(), names))


def load_optimizer(path: Path, optimizer, model: paddle.nn.Layer) -> None:
    """Restores what `save_optimizer` wrote.

    Raises:
        InputError: the file cannot be read or belongs to another model.
    """
    names = {name: p.name for name, p in model.named_parameters()}
    with _restoring(path) as state:
        optimizer.set_state_dict(_to_tensors(_rename(state, names)))


def _rename(state: dict, names: dict[str, str]) -> dict:
    renamed = {}
    for key, value in state.items():
        if key == "LR_Scheduler":
            renamed[key] = value
        elif key == "master_weights":
            renamed[key] = {_renamed(name, names): weight for name, weight in value.items()}
        else:
            renamed[_renamed(key, names)] = value
    return renamed


def _renamed(key: str, names: dict[str, str]) -> str:
    """Replaces the parameter name that `key` begins with: "<name>_moment1_0" and the like."""
    end = len(key)
    while end > 0:
        if key[:end] in names:
            return names[key[:end]] + key[end:]
        end = key.rfind("_", 0, end)
    raise InputError(f"it has state for {key!r}, which the model has not: it belongs to another model")


def _to_tensors(value):
    if isinstance(value, dict):
        return {key: _to_tensors(item) for key, item in value.items()}
    return paddle.to_tensor(value) if isinstance(value, np.ndarray) else value


def rng_state() -> dict:
    """State of Python's, NumPy's and Paddle's generators as plain values."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "paddle": [generator.get_state().__getstate__() for generator in _generators()],
    }


def read_rng_state(path: Path) -> None:
    """Restores the generators from a file with what `rng_state` returned.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    with _restoring(path) as state:
        set_rng_state(state)


def set_rng_state(state: dict) -> None:
    """Restores what `rng_state` returned; a run on other devices keeps its own Paddle generators."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    generators = _generators()
    if len(generators) == len(state["paddle"]):
        for generator, values in zip(generators, state["paddle"], strict=True):
            # Of its own: `__setstate__` does nothing to a state that has its values.
            kind = type(generator.get_state())
            saved = kind.__new__(kind)
            saved.__setstate__(tuple(values))
            generator.set_state(saved)


def _generators() -> list:
    core = paddle.framework.core
    generators = [core.default_cpu_generator()]
    if core.is_compiled_with_cuda():
        generators += [core.default_cuda_generator(i) for i in range(core.get_cuda_device_count())]
    return generators
