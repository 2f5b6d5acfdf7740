"""Parts of a Stable Diffusion XL pipeline, of ppdiffusers' or diffusers' (PyTorch) layout: UNet and noise schedule."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from latent_diffusion.checkpoint import set_weights
from latent_diffusion.errors import InputError
from latent_diffusion.hub import existing_file, local_folder, read_json
from latent_diffusion.ops import LayerNorm
from latent_diffusion.pretrained import (
    COMPONENT_CONFIG,
    PADDLE_FILES,
    PIPELINE_INDEX,
    TORCH_FILES,
    check_size,
    describing,
)
from latent_diffusion.schedules import NoiseSchedule
from latent_diffusion.weights import read_weights, transpose_linear

from .lora import UNET
from .micro_conditioning import TIME_IDS
from .objective import Prediction

# Names of parts in errors, or of their folders in a pipeline's, or both.
_UNET, _SCHEDULER = "UNet", "scheduler"
VAE = "vae"
_SCHEDULER_CONFIG = "scheduler_config.json"

_FILES = PADDLE_FILES + TORCH_FILES

# By this key of a UNet's configuration Stable Diffusion XL is told from other ones: it takes pooled text and sizes.
_CONDITION_KEY, _CONDITION = "addition_embed_type", "text_time"

_MAX_TIMESTEPS = 100_000


def part_of(pipeline: str, part: str) -> str:
    """The folder of a part of a pipeline, or its name on the hub.

    Raises:
        InputError: the pipeline is a folder and has no such part.
    """
    folder = Path(pipeline)
    if folder.is_dir() and not (folder / part).is_dir():
        raise InputError(
            f"{pipeline} holds no folder {part}: it is no pipeline of Stable Diffusion XL, which has a UNet, a VAE, a "
            "scheduler, and two text encoders with a tokenizer each; give one that is"
        )
    return f"{pipeline.rstrip('/')}/{part}"


def load_unet(name_or_path: str, dtype: str = "float32"):
    """Loads the UNet of a Stable Diffusion XL pipeline.

    Takes the memory of its weights twice: as they are in the file and as they are in the network.

    Args:
        name_or_path: a pipeline folder of ppdiffusers or diffusers, or its name on the hub.
        dtype: of its weights, whatever the file has.

    Returns:
        A `UNet2DConditionModel` in eval mode whose weights need no gradients.

    Raises:
        InputError: there is no such folder, its files are bad, it is no UNet of that kind, or the hub cannot be
            reached.
    """
    config, source = _unet_config(name_or_path)
    file = existing_file(source.parent, _FILES, _UNET)
    weights = read_weights(file)
    unet = _build_unet(config, source, weights, dtype)
    if file.name in TORCH_FILES:
        weights = transpose_linear(weights)
    set_weights(unet, weights, file)
    freeze(unet)
    return unet


def read_unet_config(name_or_path: str) -> dict[str, Any]:
    """The configuration of the UNet of a Stable Diffusion XL pipeline, whose weights may not even fit into memory.

    Raises:
        InputError: as `load_unet` does.
    """
    return _unet_config(name_or_path)[0]


def _unet_config(name_or_path: str) -> tuple[dict[str, Any], Path]:
    """Its content and the file; with the weights beside it."""
    folder = local_folder(part_of(name_or_path, UNET), (COMPONENT_CONFIG, _FILES), _UNET)
    source = existing_file(folder, (COMPONENT_CONFIG,), _UNET)
    config = read_json(source)
    if (found := config.get(_CONDITION_KEY)) != _CONDITION:
        raise InputError(
            f"{source} describes no UNet of Stable Diffusion XL: its {_CONDITION_KEY} is {found!r}, not {_CONDITION!r}"
        )
    return config, source


def _build_unet(config: dict, source: Path, weights: dict[str, np.ndarray], dtype: str):
    """A UNet without weights, which are to be set; `source` names the configuration in errors."""
    from ppdiffusers import UNet2DConditionModel

    with describing(source, "a UNet2DConditionModel"):
        check_size(weights, *_least_size(config))
        # Random weights would take minutes and, until they are replaced, memory.
        with paddle.LazyGuard(), paddle.dtype_guard(dtype):
            return UNet2DConditionModel.from_config(config)


def _least_size(config: dict) -> tuple[float, int]:
    """How many numbers and layers such a UNet has at least: a convolution a resolution, and all its transformers."""
    channels = config["block_out_channels"]
    layers = _total(config.get("layers_per_block", 2)) + _total(config.get("transformer_layers_per_block", 1))
    return sum(9 * count**2 for count in channels), layers


def _total(counts: Any) -> int:
    """The sum of a number, or of lists in lists of them."""
    return sum(map(_total, counts)) if isinstance(counts, list | tuple) else abs(counts)


def freeze(network: nn.Layer) -> None:
    """Puts a network in eval mode and lets its weights need no gradients; those of its inputs stay right.

    Paddle's own LayerNorm gives wrong gradients of its input on a CPU where its weight needs none (3.3.1: as if there
    were no weight).
    """
    network.eval()
    for parameter in network.parameters():
        parameter.stop_gradient = True
    for layer in network.sublayers(include_self=True):
        if type(layer) is nn.LayerNorm:
            layer.__class__ = LayerNorm


def check_conditions(config: Mapping[str, Any], width: int, pooled_width: int) -> None:
    """Raises `InputError` unless a UNet takes contexts of that width, pooled texts of the other, and six sizes.

    Args:
        config: of the UNet.
        width: of contexts.
        pooled_width: of pooled texts.
    """
    if (found := config.get("cross_attention_dim")) != width:
        raise InputError(
            f"the text encoders give contexts of width {width}, the UNet takes {found}; give the parts of one pipeline"
        )
    taken, size_width = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
    expected = TIME_IDS * size_width + pooled_width if isinstance(size_width, int) else None
    if taken is None or taken != expected:
        raise InputError(
            f"the UNet takes {taken} values of sizes and pooled text, which are {expected} in this pipeline; give a "
            "base model of Stable Diffusion XL, no refiner"
        )


def load_noise_schedule(name_or_path: str, prediction_type: str | None = None) -> tuple[NoiseSchedule, Prediction]:
    """The noise that a pipeline was trained with, whatever scheduler it draws with.

    Args:
        name_or_path: a pipeline folder or its name on the hub.
        prediction_type: what the network predicts, whatever the scheduler says.

    Returns:
        The schedule, and what the network predicts.

    Raises:
        InputError: there is no such folder, its file is bad, it predicts something else, or the hub cannot be reached.
    """
    from ppdiffusers import DDPMScheduler

    source = _scheduler_config(name_or_path)
    scheduler = _build_scheduler(DDPMScheduler, read_json(source), source)
    prediction_type, known = prediction_type or scheduler.config.prediction_type, [kind.value for kind in Prediction]
    if prediction_type not in known:
        raise InputError(f"{source} has prediction_type {prediction_type!r}; known are {' and '.join(known)}")
    betas = scheduler.betas.numpy()
    if not ((betas > 0) & (betas <= 1)).all():
        raise InputError(f"{source} gives noise of variance {betas.min()} to {betas.max()}, which must be from 0 to 1")
    return NoiseSchedule(betas), Prediction(prediction_type)


def load_scheduler(name_or_path: str):
    """The scheduler that a pipeline draws with: of the class of ppdiffusers that its configuration names.

    Raises:
        InputError: there is no such folder, its file is bad, ppdiffusers has no such class, or the hub cannot be
            reached.
    """
    import ppdiffusers
    from ppdiffusers import SchedulerMixin

    source = _scheduler_config(name_or_path)
    config = read_json(source)
    name = config.get("_class_name")
    scheduler_class = getattr(ppdiffusers, name, None) if isinstance(name, str) else None
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, SchedulerMixin):
        raise InputError(f"{source} names the class {name!r}, which is no scheduler of ppdiffusers")
    return _build_scheduler(scheduler_class, config, source)


def zeros_for_empty_prompt(name_or_path: str) -> bool:
    """Whether guidance leads away from zeros, as a pipeline's index says and SDXL's does, or from the empty prompt.

    Raises:
        InputError: there is no such folder, its index is bad, or the hub cannot be reached.
    """
    folder = local_folder(name_or_path, (PIPELINE_INDEX,), "pipeline")
    index = read_json(existing_file(folder, (PIPELINE_INDEX,), "pipeline"))
    return index.get("force_zeros_for_empty_prompt", True) is True


def _scheduler_config(name_or_path: str) -> Path:
    folder = local_folder(part_of(name_or_path, _SCHEDULER), (_SCHEDULER_CONFIG,), _SCHEDULER)
    return existing_file(folder, (_SCHEDULER_CONFIG,), _SCHEDULER)


def _build_scheduler(scheduler_class: type, config: dict, source: Path):
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not 1 <= steps <= _MAX_TIMESTEPS:
        raise InputError(f"{source} has num_train_timesteps {steps!r}, which must be from 1 to {_MAX_TIMESTEPS}")
    with describing(source, f"a {scheduler_class.__name__}"):
        return scheduler_class.from_config(config)
