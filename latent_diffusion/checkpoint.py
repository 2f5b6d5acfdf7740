"""The checkpoint folder: what it holds, how it is found, and the state that goes into it.

    output_dir/checkpoint-N/
        model_state.pdparams  ema_state.pdparams  optimizer.pdopt  scheduler.pdparams  scaler.pdparams
        rng_state*.pth  trainer_state.json  training_args.bin  config.json
    output_dir/best/
        model_state.pdparams  ema_state.pdparams  config.json  evaluation.json

A folder of such a name is complete: it is written under another name and renamed. All state is read without executing
anything from the files.
"""

import itertools
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle

from . import distributed
from .ema import EMA
from .errors import InputError
from .files import publish_folder
from .weights import read_paddle, read_weights, write_paddle

MODEL, EMA_MODEL, CONFIG = "model_state.pdparams", "ema_state.pdparams", "config.json"
OPTIMIZER, SCHEDULER, SCALER = "optimizer.pdopt", "scheduler.pdparams", "scaler.pdparams"
TRAINER_STATE, TRAINING_ARGUMENTS = "trainer_state.json", "training_args.bin"

# The weights that evaluation during training found best, and the file that says how good they are.
BEST, EVALUATION = "best", "evaluation.json"

# Said when a run goes on with batches of another size.
OTHER_BATCHES = "other samples a step than before: the order of data changes from here on"

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints below `output_dir`, by rising step."""
    if not output_dir.is_dir():
        return []
    folders = [path for path in output_dir.iterdir() if _NAME.fullmatch(path.name) and (path / TRAINER_STATE).is_file()]
    return sorted(folders, key=_step)


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    return (checkpoints(output_dir) or [None])[-1]


def remove_oldest(output_dir: Path, keep: int | None) -> None:
    """Deletes all but the `keep` newest checkpoints; None or less than 1 keeps all."""
    if keep and keep > 0:
        for path in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(path)


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
        found = json.loads(path.read_text())
        return found | {"step": int(found["step"]), "fid": float(found["fid"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not say how good the weights beside it are ({type(error).__name__}: {error}); move the "
            "folder away"
        ) from None


def save(final: Path, write: Callable[[Path], None], keep: int | None = None) -> None:
    """Lets all processes together `write` into a temporary folder, which then becomes the checkpoint `final`.

    All processes call it; afterwards all but the `keep` newest checkpoints beside it are deleted.
    """
    first = paddle.distributed.get_rank() == 0
    staging = final.with_name(f".{final.name}.partial")
    if first:
        shutil.rmtree(staging, ignore_errors=True)
    distributed.barrier()
    staging.mkdir(parents=True, exist_ok=True)
    write(staging)
    distributed.barrier()
    if first:
        publish_folder(staging, final)
        remove_oldest(final.parent, keep)
    distributed.barrier()


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
    """Writes what sampling and conversion need: weights, their average and the configuration; see `write_state`."""
    write_paddle(folder / MODEL, model.state_dict())
    if ema is not None:
        write_paddle(folder / EMA_MODEL, ema.state_dict())
    model.config.save(folder / CONFIG)


def read_averaged_weights(folder: Path, model: paddle.nn.Layer, ema: EMA | None) -> None:
    """Sets the weights of a checkpoint and of their average.

    Raises:
        InputError: a file cannot be read, or is of another model.
    """
    load_weights(folder / MODEL, model)
    if ema is not None:
        ema.set_state_dict(read_paddle(folder / EMA_MODEL))


def read_schedule(folder: Path, lr_scheduler, scaler) -> None:
    """Restores the learning rate schedule and the loss scale of a checkpoint."""
    lr_scheduler.set_state_dict(read_paddle(folder / SCHEDULER))
    # The state has the earlier run's learning rate, which would hold for one step more than the flags say.
    lr_scheduler.step(lr_scheduler.last_epoch)
    if scaler is not None:
        scaler.load_state_dict(read_paddle(folder / SCALER))


def read_progress(folder: Path) -> tuple[int, int]:
    """The step of a checkpoint, and how many samples had been consumed by then.

    Raises:
        InputError: the file that says so cannot be read.
    """
    path = folder / TRAINER_STATE
    try:
        state = json.loads(path.read_text())
        return int(state["global_step"]), int(state["consumed_samples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not say how far the run had come ({type(error).__name__}: {error}); resume another checkpoint"
        ) from None


def check_config(folder: Path, config) -> None:
    """Raises `InputError` unless the checkpoint is of a model of this configuration; the message names the key."""
    saved = type(config).from_json(folder / CONFIG).to_dict()
    for key, value in config.to_dict().items():
        if saved[key] != value:
            raise InputError(
                f"{folder} is of a model with {key} {saved[key]!r}, not {value!r}; give its configuration, or "
                "another output folder"
            )


def all_finite(model: paddle.nn.Layer) -> bool:
    """Whether no weight is infinite or no number."""
    return all(bool(paddle.isfinite(p).all()) for p in model.parameters())


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
    # The reader gives float32 for bfloat16.
    model.set_state_dict({name: paddle.to_tensor(array).astype(own[name].dtype) for name, array in weights.items()})


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
    state = read_paddle(path)
    names = {name: p.name for name, p in model.named_parameters()}
    try:
        renamed = _rename(state, names)
    except KeyError as error:
        raise InputError(
            f"{path} has state for {error}, which the model has not: it belongs to another model"
        ) from None
    optimizer.set_state_dict(_to_tensors(renamed))


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
    raise KeyError(key)


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
