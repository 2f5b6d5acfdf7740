"""The transformer of ppdiffusers and diffusers; the only module that knows its configuration and parameter names.

`Transformer2DModel` of ppdiffusers and `DiTTransformer2DModel` of diffusers (`Transformer2DModel` before version 0.28)
have the same parameters under the same names, and the same timestep frequencies.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from latent_diffusion.errors import InputError
from latent_diffusion.pretrained import COMPONENT_CONFIG
from latent_diffusion.reading import read_json
from latent_diffusion.weights import is_torch_layout, transpose_linear

from .configuration import DiTConfig
from .modeling import LABEL_TABLE, sincos_positions

# DiTPipeline takes this label for the null class, whatever the number of classes.
PIPELINE_NULL_CLASS = 1000

# The class of this project with the official timestep frequencies, see exact.py.
EXACT_CLASS = "OfficialDiTTransformer2DModel"
_CLASSES = ("Transformer2DModel", "DiTTransformer2DModel", EXACT_CLASS)

# The timestep convention that the weights were trained with, which the classes themselves cannot express. Both
# libraries pass over keys that begin with an underscore.
CONVENTION_KEY = "_timestep_convention"

# What makes the transformer a DiT.
_FIXED_ARGUMENTS = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}

# Layers, DiT's name first.
_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK_LAYERS = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# The transformer has a copy of these in each block.
_REPEATED_LAYERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
}
_REPEATED_LABEL_TABLE = "norm1.emb.class_embedder.embedding_table.weight"


def transformer_arguments(config: DiTConfig) -> dict[str, Any]:
    """The arguments that make a transformer the network of `config`.

    Raises:
        InputError: the network has a shape that the classes cannot express.
    """
    if config.num_classes > PIPELINE_NULL_CLASS:
        raise InputError(
            f"DiTPipeline takes class {PIPELINE_NULL_CLASS} for the null class: a model of {config.num_classes} "
            "classes cannot be exported"
        )
    if config.mlp_ratio != 4.0:
        raise InputError(f"ppdiffusers' transformer has an MLP ratio of 4; the model has {config.mlp_ratio:g}")
    return _FIXED_ARGUMENTS | {
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.num_layers,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": PIPELINE_NULL_CLASS,
        "norm_eps": 1e-6,  # the classes' default of 1e-5 is not DiT's
    }


def to_transformer(weights: dict[str, np.ndarray], config: DiTConfig) -> dict[str, np.ndarray]:
    """Renames the weights of a `DiT` for the transformer; both in Paddle's layout.

    The label table [K + 1, D] becomes [1001, D]: the null row, K, also fills every row from K to 1000.
    """
    weights = weights | {LABEL_TABLE: _filled(weights[LABEL_TABLE])}
    renamed = {target: weights[source] for source, target in _names(config.num_layers)}
    for source, targets in _split_names(config.num_layers):
        renamed |= zip(targets, np.split(weights[source], 3, axis=-1), strict=True)
    return renamed


def is_transformer(weights: dict[str, np.ndarray]) -> bool:
    """Whether weights have the transformer's names."""
    return "proj_out_1.weight" in weights


def from_transformer(weights: dict[str, np.ndarray], file: Path) -> tuple[DiTConfig, dict[str, np.ndarray]]:
    """The network that a transformer's weights and the `config.json` beside them describe.

    A `norm_eps` other than DiT's 1e-6 is passed over: the classes' default of 1e-5 makes a difference only for tokens
    of a variance near that, and the published checkpoints were trained with 1e-6.

    Args:
        weights: in Paddle's or PyTorch's layout.
        file: where they were read.

    Returns:
        The configuration, and the weights under the names of `DiT` and in Paddle's layout. Rows at the end of the label
        table that are alike are taken for one null class.

    Raises:
        InputError: the configuration or the weights are not those of a DiT.
    """
    config = _read_config(file.with_name(COMPONENT_CONFIG))
    if is_torch_layout(weights["proj_out_1.weight"]):
        weights = transpose_linear(weights)
    found = _renamed_back(weights, config.num_layers, file)
    found[LABEL_TABLE] = _without_filling(found[LABEL_TABLE])
    found["pos_embed"] = sincos_positions(config.hidden_size, config.sample_size // config.patch_size)
    return dataclasses.replace(config, num_classes=len(found[LABEL_TABLE]) - 1), found


def _names(num_layers: int) -> Iterator[tuple[str, str]]:
    """Pairs of names, DiT's first, of everything but the split weights; the repeated come once a block."""
    layers = list(_LAYERS.items())
    for i in range(num_layers):
        block = f"transformer_blocks.{i}"
        layers += [(f"blocks.{i}.{source}", f"{block}.{target}") for source, target in _BLOCK_LAYERS.items()]
        layers += [(source, f"{block}.{target}") for source, target in _REPEATED_LAYERS.items()]
        yield LABEL_TABLE, f"{block}.{_REPEATED_LABEL_TABLE}"
    for source, target in layers:
        for kind in ("weight", "bias"):
            yield f"{source}.{kind}", f"{target}.{kind}"


def _split_names(num_layers: int) -> Iterator[tuple[str, list[str]]]:
    """DiT's names of weights that the transformer has in three parts, with the names of the parts."""
    for i in range(num_layers):
        for kind in ("weight", "bias"):
            parts = [f"transformer_blocks.{i}.attn1.to_{part}.{kind}" for part in "qkv"]
            yield f"blocks.{i}.attn.qkv.{kind}", parts


def _renamed_back(weights: dict[str, np.ndarray], num_layers: int, file: Path) -> dict[str, np.ndarray]:
    weights, found = dict(weights), {}
    try:
        for source, target in _names(num_layers):
            value = weights.pop(target)
            if not np.array_equal(found.setdefault(source, value), value):
                raise InputError(f"{target} in {file} is not that of the first block: a DiT has one for all blocks")
        for source, targets in _split_names(num_layers):
            parts = [weights.pop(target) for target in targets]
            if len({part.shape for part in parts}) > 1:
                raise InputError(f"{targets[0]} in {file} has another shape than its siblings")
            found[source] = np.concatenate(parts, axis=-1)
    except KeyError as error:
        raise InputError(f"{file} lacks the weight {error.args[0]}: it belongs to another model") from None
    if weights:
        raise InputError(f"{file} has the weight {min(weights)}, which a DiT has not: it belongs to another model")
    return found


def _filled(table: np.ndarray) -> np.ndarray:
    missing = PIPELINE_NULL_CLASS + 1 - len(table)
    return np.concatenate([table, np.repeat(table[-1:], missing, axis=0)])


def _without_filling(table: np.ndarray) -> np.ndarray:
    classes = np.flatnonzero((table != table[-1]).any(axis=1))
    return table[: classes[-1] + 2] if len(classes) else table


def _read_config(path: Path) -> DiTConfig:
    """What a transformer's `config.json` says of the network: all but the number of classes."""
    try:
        values = read_json(path)
        name = values["_class_name"]
    except OSError as error:
        raise InputError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path} is not the configuration of a transformer: it names no _class_name") from None
    if name not in _CLASSES:
        raise InputError(f"{path} describes a {name}; a DiT is a {' or '.join(_CLASSES)}")
    for key, expected in _FIXED_ARGUMENTS.items():
        if values.get(key) != expected:
            raise InputError(f"{path} has {key} {values.get(key)!r}: of a DiT it is {expected!r}")
    shape = ("sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim")
    convention = values.get(CONVENTION_KEY, "official" if name == EXACT_CLASS else "ppdiffusers")
    config = DiTConfig.from_dict(
        {key: values.get(key) for key in shape} | {"timestep_convention": convention}, str(path)
    )
    out_channels = values.get("out_channels") or config.in_channels
    if out_channels not in (config.in_channels, 2 * config.in_channels):
        raise InputError(f"{path} has {out_channels} out_channels; a DiT has as many as in_channels, or twice as many")
    return dataclasses.replace(config, learn_sigma=out_channels != config.in_channels)
