"""LoRA: low-rank layers beside frozen Linear layers; their files, and merging them in.

E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Layers and names are those of
`train_text_to_image_lora_sdxl.py` of diffusers. A weight's name is the same everywhere here, in networks, checkpoints
and files: `<part>.<layer>.lora.down.weight` of a UNet, `<part>.<layer>.lora_linear_layer.down.weight` of text encoders,
`up` likewise, where a part is `unet`, `text_encoder` or `text_encoder_2`. Arrays are in Paddle's layout, [in, rank] and
[rank, out], but in files for PyTorch.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from latent_diffusion.errors import InputError, naming_file
from latent_diffusion.weights import read_config, read_weights, transpose_linear, write_safetensors

# Names by which both libraries find a LoRA in a folder, diffusers' first.
TORCH_FILE, PADDLE_FILE = "pytorch_lora_weights.safetensors", "paddle_lora_weights.safetensors"
_FILES = (PADDLE_FILE, TORCH_FILE, "paddle_lora_weights.pdparams", "pytorch_lora_weights.bin")

# Parts of a pipeline that may have LoRA layers.
UNET, TEXT_ENCODERS = "unet", ("text_encoder", "text_encoder_2")

# The layers of an attention that get LoRA layers beside them.
_UNET_TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0")
_TEXT_TARGETS = (".q_proj", ".k_proj", ".v_proj", ".out_proj")
_UNET_KIND, _TEXT_KIND = "lora", "lora_linear_layer"

_WEIGHT = re.compile(
    rf"(?P<part>{UNET}|{'|'.join(TEXT_ENCODERS)})\.(?P<layer>.+)"
    rf"\.(?:{_UNET_KIND}|{_TEXT_KIND})\.(?P<side>down|up)\.weight"
)

# How other writers spell these names: peft, and diffusers' attention processors before version 0.22.
_OTHER_SPELLINGS = (
    (r"\.lora_A\.weight$", ".lora.down.weight"),
    (r"\.lora_B\.weight$", ".lora.up.weight"),
    (r"\.processor\.", "."),
    (r"\.self_attn\.to_(q|k|v|out)_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.to_(q|k|v)_lora\.", r".to_\1.lora."),
    (r"\.to_out_lora\.", ".to_out.0.lora."),
)


# Where newer diffusers keeps the configuration of peft, and what there is in it that changes what layers compute.
_SETTINGS = "lora_adapter_metadata"
_OTHER_SCALES = ("alpha_pattern", "use_rslora", "use_dora")


def add_lora(part: str, network: nn.Layer, rank: int) -> dict[str, nn.Layer]:
    """Puts LoRA layers beside the attention layers of a UNet or text encoder, with ppdiffusers' own classes.

    They change nothing until they are trained: `down` is drawn from N(0, 1 / rank^2), `up` is zero, as by peft's
    initialization "gaussian". Their output is not scaled.

    Args:
        part: "unet", "text_encoder" or "text_encoder_2".
        network: a `UNet2DConditionModel`, or a text encoder of CLIP.
        rank: width of the layers between, from 1.

    Returns:
        The new layers by `<part>.<layer>.<kind>`, to which the names of their weights are added; float32.
    """
    targets, kind = (_UNET_TARGETS, _UNET_KIND) if part == UNET else (_TEXT_TARGETS, _TEXT_KIND)
    layers = [(name, layer) for name, layer in network.named_sublayers() if name.endswith(targets)]
    add = _add_to_unet if part == UNET else _add_to_text_encoder
    return {f"{part}.{name}.{kind}": add(network, name, layer, rank) for name, layer in layers}


def _add_to_unet(unet: nn.Layer, name: str, layer: nn.Layer, rank: int) -> nn.Layer:
    from .layers import LoRALayer

    lora = LoRALayer(layer.in_features, layer.out_features, rank)
    layer.set_lora_layer(lora)
    return lora


def _add_to_text_encoder(encoder: nn.Layer, name: str, layer: nn.Layer, rank: int) -> nn.Layer:
    from ppdiffusers.models.lora import PatchedLoraProjection

    attention, _, projection = name.rpartition(".")
    patched = PatchedLoraProjection(layer, rank=rank, dtype="float32")
    setattr(encoder.get_sublayer(attention), projection, patched)
    return patched.lora_linear_layer


def write_lora(folder: Path, weights: Mapping[str, Any]) -> None:
    """Writes a LoRA such that `load_lora_weights(folder)` of diffusers and of ppdiffusers finds it.

    ppdiffusers loads that of a UNet; of one with text encoders its own loader raises an error, see `load_lora`.

    Args:
        folder: made if it is not there; each of the two files appears when it is complete.
        weights: tensors or arrays, as `SDXLLoRA.state_dict()` names them.

    Raises:
        OSError: the folder cannot be written.
    """
    # Before NumPy sees it: it would take the bits of a bfloat16 tensor for integers.
    arrays = {name: np.asarray(value.astype("float32")) for name, value in weights.items()}
    with naming_file(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / TORCH_FILE, transpose_linear(arrays), layout="pt")
    write_safetensors(folder / PADDLE_FILE, arrays, layout="pd")


def read_lora(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a LoRA that was written here, by ppdiffusers or diffusers, with peft or before it.

    Args:
        path: the file, or a folder that holds it under the name that either library gives it.

    Returns:
        Names and float32 arrays as `write_lora` takes them.

    Raises:
        InputError: there is no such file, it cannot be read or is refused, or it is no LoRA of these kinds.
    """
    file = _find(Path(path))
    weights = {_usual_name(name, file): np.asarray(value, np.float32) for name, value in read_weights(file).items()}
    if _is_torch(_layers(weights, file), file):
        weights = transpose_linear(weights)
    return weights | _scaled(_layers(weights, file), file)


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    file = next((path / name for name in _FILES if (path / name).is_file()), None)
    if file is None:
        raise InputError(f"{path} holds no LoRA: none of {', '.join(_FILES)}; name the file itself")
    return file


def _usual_name(name: str, file: Path) -> str:
    usual = name
    for pattern, replacement in _OTHER_SPELLINGS:
        usual = re.sub(pattern, replacement, usual)
    if not usual.startswith(tuple(f"{part}." for part in (UNET, *TEXT_ENCODERS))):
        usual = f"{UNET}.{usual}"  # of a UNet alone, in old files
    if not (found := _WEIGHT.fullmatch(usual)):
        raise InputError(
            f"{file} holds {name}, which is no weight of a LoRA that diffusers, ppdiffusers or peft wrote; convert it "
            "with diffusers: load_lora_weights, then save_lora_weights"
        )
    kind = _UNET_KIND if found["part"] == UNET else _TEXT_KIND
    return f"{found['part']}.{found['layer']}.{kind}.{found['side']}.weight"


def _layers(weights: dict[str, np.ndarray], file: Path) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Both sides ("down", "up") of each layer, by part and name."""
    layers = defaultdict(dict)
    for name, value in weights.items():
        found = _WEIGHT.fullmatch(name)
        if value.ndim != 2:
            raise InputError(f"{name} in {file} has shape {list(value.shape)}; only LoRA of Linear layers is supported")
        layers[found["part"], found["layer"]][found["side"]] = value
    for (part, layer), sides in layers.items():
        if len(sides) == 1:
            raise InputError(f"{file} holds only half of the LoRA of {part}.{layer}")
    return layers


def _is_torch(layers: dict[tuple[str, str], dict[str, np.ndarray]], file: Path) -> bool:
    """Whether the weights are stored (out, in), as PyTorch does.

    Both sides of a layer agree in its rank. Those of square layers do in either layout; the smaller rank is meant then,
    and where all layers are as wide as their ranks the file's name tells.
    """
    ranks = {}
    for is_torch, (down, up) in {True: (0, 1), False: (1, 0)}.items():
        found = [(sides["down"].shape[down], sides["up"].shape[up]) for sides in layers.values()]
        if all(one == other for one, other in found):
            ranks[is_torch] = sum(rank for rank, _ in found)
    if not ranks:
        raise InputError(f"the LoRA in {file} is damaged: both sides of a layer have different ranks")
    return min(ranks, key=lambda is_torch: (ranks[is_torch], is_torch == ("paddle" in file.name)))


def _scaled(layers: dict[tuple[str, str], dict[str, np.ndarray]], file: Path) -> dict[str, np.ndarray]:
    """The weights of those `up` sides that the file says to be scaled, by alpha / rank; without a word they are not."""
    settings = read_config(file, _SETTINGS) or {}
    scaled = {}
    for (part, layer), sides in layers.items():
        if unknown := [key for key in _OTHER_SCALES if settings.get(f"{part}.{key}")]:
            raise InputError(f"{file} was trained with {unknown[0]} of peft, which is not supported")
        rank = sides["up"].shape[0]
        alpha = settings.get(f"{part}.lora_alpha", rank)
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise InputError(f"{file} has lora_alpha {alpha!r}, which is no positive number")
        if alpha != rank:
            kind = _UNET_KIND if part == UNET else _TEXT_KIND
            scaled[f"{part}.{layer}.{kind}.up.weight"] = sides["up"] * np.float32(alpha / rank)
    return scaled


@paddle.no_grad()
def merge_lora(networks: Mapping[str, nn.Layer], weights: dict[str, np.ndarray], source: Path) -> None:
    """Adds a LoRA to the weights of the networks that it belongs to; nothing is changed if one of them does not fit.

    Args:
        networks: by part: "unet", "text_encoder", "text_encoder_2".
        weights: from `read_lora`.
        source: names the LoRA in errors.

    Raises:
        InputError: it has a layer that the networks have not, or one of another shape.
    """
    own = {f"{part}.{name}": layer for part, net in networks.items() for name, layer in net.named_sublayers()}
    merged = []
    for (part, layer), sides in _layers(weights, source).items():
        linear = own.get(f"{part}.{layer}")
        if not isinstance(linear, nn.Linear):
            raise InputError(f"{source} is of another model: it has LoRA for {part}.{layer}, which is no layer here")
        found, expected = [sides["down"].shape[0], sides["up"].shape[1]], list(linear.weight.shape)
        if found != expected:
            raise InputError(
                f"{source} is of another model: its LoRA for {part}.{layer} is for a weight of shape {found}, here it "
                f"has {expected}"
            )
        merged.append((linear.weight, sides["down"], sides["up"]))
    for weight, down, up in merged:
        change = paddle.matmul(paddle.to_tensor(down), paddle.to_tensor(up))
        weight.set_value((weight.astype("float32") + change).astype(weight.dtype))


def load_lora(pipeline: Any, path: str | Path) -> None:
    """Merges a LoRA into a `StableDiffusionXLPipeline` of ppdiffusers, with that of its text encoders.

    ppdiffusers' own `load_lora_weights` raises an error at LoRA of text encoders (version 0.29).

    Args:
        pipeline: the weights of its networks are changed.
        path: for `read_lora`.

    Raises:
        InputError: see `read_lora`, or it does not fit the pipeline.
    """
    parts = (UNET, *TEXT_ENCODERS)
    merge_lora({part: getattr(pipeline, part) for part in parts}, read_lora(path), Path(path))
