"""Weights in the layout of the official PyTorch code: facebookresearch/DiT, and fast-DiT, which took it over."""

import math
from pathlib import Path

import numpy as np

from latent_diffusion.errors import InputError
from latent_diffusion.files import preparing_folder
from latent_diffusion.weights import transpose_linear, write_safetensors, write_torch

from .configuration import MODEL_NAMES, DiTConfig
from .modeling import LABEL_TABLE, DiT

_WRITERS = {".pt": write_torch, ".safetensors": write_safetensors}


def infer_config(weights: dict[str, np.ndarray], file: Path, like: DiTConfig | None = None) -> DiTConfig:
    """The configuration that the shapes of official weights tell.

    Shapes do not tell the number of heads: it is that of the published model that is as deep and as wide, or of `like`
    where that is.

    Args:
        weights: with DiT's names, in PyTorch's layout.
        file: names the weights in errors.

    Raises:
        InputError: weights of a DiT are missing, or it is none of the published models.
    """
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        tokens = weights["pos_embed"].shape[1]
        classes = len(weights[LABEL_TABLE]) - 1
        hidden = len(weights["blocks.0.mlp.fc1.weight"])
        outputs = len(weights["final_layer.linear.weight"])
    except KeyError as error:
        raise InputError(f"{file} lacks the weight {error.args[0]}: it holds no DiT") from None
    except (ValueError, IndexError, TypeError):
        raise InputError(f"{file} holds no DiT: its weights have other shapes") from None
    depth = sum(key.startswith("blocks.") and key.endswith(".attn.qkv.weight") for key in weights)
    heads = _heads(depth, width, like)
    if heads is None and like is not None:
        raise InputError(
            f"{file} has {depth} layers of width {width}, the model to be trained {like.num_layers} of "
            f"{like.hidden_size}; choose the configuration of the trained weights"
        )
    if heads is None:
        raise InputError(
            f"{file} is none of the published models, and its number of attention heads cannot be told from its "
            "weights; give its configuration with --config_file"
        )
    values = {
        "sample_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_classes": classes,
        "mlp_ratio": hidden / width,
        "learn_sigma": outputs != patch**2 * channels,
        "timestep_convention": "official",
    }
    return DiTConfig.from_dict(values, f"what the weights of {file} tell")


def save_official(model: DiT, path: Path) -> None:
    """Writes the weights of `model`, float32, as a state dict that the official code loads, and its configuration.

    The configuration says which timestep convention the weights have; the official code knows only its own.

    Args:
        model: the network.
        path: a `.pt` file, as `torch.save` writes it, or `.safetensors`.

    Raises:
        InputError: `path` is neither, or its folder does not exist or cannot be written.
    """
    write = _WRITERS.get(path.suffix)
    if write is None:
        raise InputError(f"the output {path} is not a weight file: its name must end in {' or '.join(_WRITERS)}")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of the output does not exist; make it first")
    weights = {name: tensor.astype("float32").numpy() for name, tensor in model.state_dict().items()}
    with preparing_folder(path.parent):
        write(path, transpose_linear(weights), model.config.to_dict())


def _heads(depth: int, width: int, like: DiTConfig | None) -> int | None:
    configs = [*map(DiTConfig.from_name, MODEL_NAMES), *([like] if like else [])]
    return next((c.num_attention_heads for c in configs if (c.num_layers, c.hidden_size) == (depth, width)), None)
