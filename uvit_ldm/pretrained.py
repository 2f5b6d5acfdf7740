"""Trained weights of a U-ViT, wherever they come from, and the network that training begins with."""

from pathlib import Path

import numpy as np

from latent_diffusion.errors import InputError
from latent_diffusion.pretrained import (
    COMPONENT_CONFIG,
    COMPONENT_WEIGHTS,
    PIPELINE_INDEX,
    Pretrained,
    agreed,
    described_config,
    find_weights,
    plain_weights,
)
from latent_diffusion.weights import choose_weights, is_torch_layout, read_content, transpose_linear

from .configuration import PIPELINES, STABLE_DIFFUSION, UViTConfig
from .modeling import UViT

# The network in a pipeline folder, and the prefix of its weights in a checkpoint of PaddleMIX, which also holds the VAE
# and the text encoder.
COMPONENT = "unet"

# The other parts of a pipeline folder; the name of the text encoder depends on the pipeline.
VAE_COMPONENT, TOKENIZER_COMPONENT = "vqvae", "tokenizer"

# What the reference calls raw and averaged weights in the folder of a checkpoint (`TrainState.save` of `utils.py`).
_OFFICIAL_FILES = {False: "nnet.pth", True: "nnet_ema.pth"}

# By its shape the layout of the others is told.
_WIDENING_WEIGHT = "in_blocks.0.attn.qkv.weight"


def read_pretrained(
    source: Path, config_file: Path | None = None, use_ema: bool = True, like: UViTConfig | None = None
) -> Pretrained:
    """Reads a trained U-ViT; what is in a file decides how it is read, not its name.

    Args:
        source: one of
            - a checkpoint folder, an output folder (its newest checkpoint), or a `.pdparams` file of this suite;
            - a file of the official PyTorch code (`nnet.pth`, `nnet_ema.pth`), or the folder `<step>.ckpt` of both;
            - a `.pdparams` file of PaddleMIX: its raw weights, since the average there was never updated;
            - a pipeline folder of ppdiffusers, its `unet` folder, or the weight file in that.
        config_file: the configuration (`config/uvit_*.json`), for weights that nothing describes.
        use_ema: of a folder that holds both take the averaged weights, not the raw ones.
        like: the configuration of weights that neither they nor `config_file` describe.

    Raises:
        InputError: there are no weights, they cannot be read, are refused or belong to something else, or their
            configuration is unknown or contradicts `config_file`.
    """
    file, weights = _read(Path(source), use_ema)
    if _WIDENING_WEIGHT not in weights:
        raise InputError(f"{file} lacks the weight {_WIDENING_WEIGHT}: it holds no U-ViT")
    torch_layout = is_torch_layout(weights[_WIDENING_WEIGHT])
    config = _find_config(file, torch_layout, config_file, like)
    return Pretrained(UViT, config, transpose_linear(weights) if torch_layout else weights, file)


def holds_uvit(source: Path, use_ema: bool = True) -> bool:
    """Whether `source`, as `read_pretrained` takes it, holds a U-ViT and not another network.

    Raises:
        InputError: there are no weights, or they cannot be read.
    """
    if (source / PIPELINE_INDEX).is_file():
        return (source / COMPONENT).is_dir()
    return _WIDENING_WEIGHT in _read(source, use_ema)[1]


def other_parts(source: Path) -> tuple[str, str, str]:
    """Names or paths of VAE, text encoder and tokenizer that go with the weights in `source`.

    Those of a pipeline folder are its own, those of other weights Stable Diffusion's.
    """
    if not (source / PIPELINE_INDEX).is_file():
        return f"{STABLE_DIFFUSION}/vae", f"{STABLE_DIFFUSION}/text_encoder", f"{STABLE_DIFFUSION}/tokenizer"
    first, second = (source / name for name in PIPELINES.values())
    return str(source / VAE_COMPONENT), str(first if first.is_dir() else second), str(source / TOKENIZER_COMPONENT)


def build_model(config: UViTConfig, pretrained: Path | None, resumed: Path | None) -> tuple[UViT, list[str]]:
    """The network that training begins with, and sentences about where it comes from.

    Args:
        config: the configuration to train.
        pretrained: weights to start from, as `read_pretrained` takes them; the averaged ones where there are two. None
            for new ones.
        resumed: the checkpoint folder whose weights will be set, or None.

    Raises:
        InputError: as `read_pretrained`, or the weights have another configuration.
    """
    if resumed is not None or pretrained is None:
        return UViT(config), []
    found = read_pretrained(pretrained, like=config)
    for key, value in config.to_dict().items():
        if (trained := found.config.to_dict()[key]) != value:
            raise InputError(
                f"{found.source} has {key} {trained!r}, the model to be trained {value!r}; choose the configuration of "
                "the trained weights"
            )
    model = found.network()
    model.train()
    return model, [f"starting from {found.source}"]


def _read(source: Path, use_ema: bool) -> tuple[Path, dict[str, np.ndarray]]:
    """The file that `source` means, and the weights of the network in it."""
    file = _find_official(source, use_ema) or find_weights(source, use_ema, COMPONENT)
    return file, plain_weights(_network_weights(choose_weights(read_content(file), file, use_ema)))


def _find_official(folder: Path, use_ema: bool) -> Path | None:
    file, other = folder / _OFFICIAL_FILES[use_ema], folder / _OFFICIAL_FILES[not use_ema]
    if other.is_file() and not file.is_file():
        raise InputError(f"{file} does not exist; give {other} itself, or --use_ema {not use_ema}")
    return file if file.is_file() else None


def _network_weights(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    prefix = f"{COMPONENT}."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return own or weights


def _find_config(file: Path, torch_layout: bool, config_file: Path | None, like: UViTConfig | None) -> UViTConfig:
    """The configuration of weights: what describes them, else what is given."""
    beside = file.with_name(COMPONENT_CONFIG)
    if file.name in COMPONENT_WEIGHTS and beside.is_file():
        return agreed(UViTConfig.from_json(beside), beside, config_file)
    described = described_config(UViTConfig, file, torch_layout, config_file)
    if described is not None:
        return described
    if config_file is not None:
        return UViTConfig.from_json(config_file)
    if like is None:
        raise InputError(f"no {COMPONENT_CONFIG} describes {file}; give its configuration with --unet_config_file")
    return like
