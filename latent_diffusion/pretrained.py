"""Finding trained weights, wherever they lie, and the configuration that describes them."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from . import checkpoint
from .configuration import ModelConfig
from .errors import InputError
from .reading import read_json
from .weights import read_config

# In every pipeline folder of (pp)diffusers.
PIPELINE_INDEX = "model_index.json"
# The configuration of a (pp)diffusers model, beside its weights.
COMPONENT_CONFIG = "config.json"
# Names under which it may hold them; which layout they have is told from their shapes.
COMPONENT_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_paddle_model.safetensors",
    "model_state.pdparams",
)

# What libraries call the weights of such a model: ppdiffusers, and diffusers in full precision before half.
PADDLE_FILES = ("model_state.pdparams", "diffusion_paddle_model.safetensors")
TORCH_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
)

# Networks up to this size are built to see what fits: they take a few megabytes and seconds.
_FEW_NUMBERS, _FEW_LAYERS = 10**6, 100

# A prefix that PyTorch's data parallelism leaves on every name.
_PARALLEL_PREFIX = "module."


@dataclass(frozen=True)
class Pretrained:
    """Weights with the names and in the layout of a backbone, float32.

    Attributes:
        backbone: the class of the network, made from its configuration.
        config: what the source says of the weights.
        weights: by name, Linear weights [in, out].
        source: the file they were read from.
    """

    backbone: Callable[[ModelConfig], paddle.nn.Layer]
    config: ModelConfig
    weights: dict[str, np.ndarray]
    source: Path

    def network(self) -> paddle.nn.Layer:
        """A network with these weights, in eval mode.

        Raises:
            InputError: they are not those of the configuration.
        """
        try:
            check_size(self.weights, self.config.least_weights, self.config.num_layers)
        except ValueError as error:
            raise InputError(f"{self.source}: {error}") from None
        model = self.backbone(self.config)
        checkpoint.set_weights(model, self.weights, self.source)
        model.eval()
        return model


@contextlib.contextmanager
def describing(source: Path, what: str) -> Iterator[None]:
    """Around making something of a configuration from outside: a wrong value can make other libraries raise anything.

    Args:
        source: the file of the configuration.
        what: is made, as "a UNet".

    Raises:
        InputError: the file does not describe that; or one that was raised within, which says more.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{source} does not describe {what}: {' '.join(str(error).split())}") from error


def check_size(weights: dict[str, np.ndarray], numbers: float, layers: int) -> None:
    """Before a network is built: a few bytes of configuration can describe one that no memory holds.

    Args:
        weights: that it is to be given.
        numbers: how many its weights have at least, by its configuration.
        layers: how many it has, each with weights of its own.

    Raises:
        ValueError: the weights are far fewer. Where a few are missing, `set_weights` names them.
    """
    count = sum(value.size for value in weights.values())
    if numbers > max(count, _FEW_NUMBERS) or layers > max(len(weights), _FEW_LAYERS):
        raise ValueError(
            f"the configuration is of {layers:.3g} layers and at least {numbers:.3g} numbers, but the weights are "
            f"{len(weights)} arrays of {count} numbers: they do not belong together"
        )


def find_weights(source: Path, use_ema: bool, component: str) -> Path:
    """The file of weights that `source` means.

    Args:
        source: a file; a checkpoint folder or an output folder (its newest checkpoint); a pipeline folder or the
            folder of its network.
        use_ema: of a checkpoint folder take the averaged weights, not the raw ones.
        component: the folder of the network in a pipeline folder.

    Raises:
        InputError: there is no such file.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise InputError(
            f"the model file {source} does not exist; give a checkpoint folder, a weight file or a pipeline folder"
        )
    return _find_component(source, component) or _find_checkpoint(source, use_ema)


def _find_component(folder: Path, component: str) -> Path | None:
    """The weight file of a pipeline folder or of its network's; None when it is neither."""
    if (folder / PIPELINE_INDEX).is_file():
        folder = folder / component
    elif not _names_a_class(folder / COMPONENT_CONFIG):
        return None
    file = next((folder / name for name in COMPONENT_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"the {component} folder {folder} holds none of {', '.join(COMPONENT_WEIGHTS)}")
    return file


def _names_a_class(config_file: Path) -> bool:
    """Whether it is the configuration of a (pp)diffusers model; a checkpoint's own names no class."""
    try:
        return "_class_name" in read_json(config_file)
    except (OSError, ValueError, TypeError):
        return False  # what is wrong with it is said when it is read


def _find_checkpoint(folder: Path, use_ema: bool) -> Path:
    newest = checkpoint.newest_checkpoint(folder, checkpoint.check_weights_file) or folder
    path = newest / (checkpoint.EMA_MODEL if use_ema else checkpoint.MODEL)
    if not path.is_file():
        hint = "; --use_ema False takes the raw weights" if use_ema and (newest / checkpoint.MODEL).is_file() else ""
        raise InputError(f"{path} does not exist: {folder} is no checkpoint folder and holds none with it{hint}")
    return path


def plain_weights(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights as float32, without the prefix that PyTorch's data parallelism leaves."""
    if all(name.startswith(_PARALLEL_PREFIX) for name in weights):
        weights = {name.removeprefix(_PARALLEL_PREFIX): value for name, value in weights.items()}
    return {name: value.astype(np.float32, copy=False) for name, value in weights.items()}


def checksum(layer: paddle.nn.Layer) -> str:
    """SHA-256 over names and values of all weights and buffers, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(layer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def described_config(
    config_class: type[ModelConfig], file: Path, torch_layout: bool, config_file: Path | None
) -> ModelConfig | None:
    """The configuration inside a file of weights, or beside it where that is a checkpoint's; None where there is none.

    Raises:
        InputError: it is damaged, or contradicts the given `config_file`.
    """
    inside, beside = read_config(file), file.with_name(checkpoint.CONFIG)
    if inside is not None:
        return agreed(config_class.from_dict(inside, f"the configuration in {file}"), file, config_file)
    if beside.is_file() and not torch_layout:
        return agreed(config_class.from_json(beside), beside, config_file)
    return None


def agreed(config: ModelConfig, found_in: Path, config_file: Path | None) -> ModelConfig:
    """The configuration that describes weights; `InputError` if the given file says otherwise."""
    if config_file is not None and (given := type(config).from_json(config_file)) != config:
        key = next(k for k, value in config.to_dict().items() if given.to_dict()[k] != value)
        raise InputError(f"{config_file} contradicts {found_in}, which describes the weights, in {key!r}")
    return config
