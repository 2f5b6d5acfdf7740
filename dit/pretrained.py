"""Trained weights of a DiT, wherever they come from, and a network to go on training from them."""

import dataclasses
from pathlib import Path

import numpy as np

from latent_diffusion import checkpoint
from latent_diffusion.errors import InputError
from latent_diffusion.pretrained import (
    COMPONENT_CONFIG,
    Pretrained,
    agreed,
    described_config,
    find_weights,
    plain_weights,
)
from latent_diffusion.weights import choose_weights, is_torch_layout, read_content, transpose_linear

from . import transformer2d
from .configuration import DiTConfig
from .modeling import LABEL_TABLE, DiT, sincos_positions
from .official import infer_config

# What fine-tuning cannot change.
_SHAPE_KEYS = (
    "patch_size",
    "in_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "mlp_ratio",
    "learn_sigma",
)


def read_pretrained(
    source: Path, config_file: Path | None = None, use_ema: bool = True, like: DiTConfig | None = None
) -> Pretrained:
    """Reads a trained DiT; what is in a file decides how it is read, not its name.

    Args:
        source: one of
            - a checkpoint folder, an output folder (its newest checkpoint), or a `.pdparams` file of this suite;
            - a file of the official PyTorch code or of fast-DiT, weights alone or a training checkpoint;
            - a DiT pipeline folder of ppdiffusers or diffusers, its transformer folder, or the weight file in that.
        config_file: the configuration (`config/*.json`), for weights that nothing describes. Official weights need
            none where they are of a published model; their timestep convention is the official one.
        use_ema: of a training checkpoint take the averaged weights, not the raw ones.
        like: of official weights of no published model, the configuration that tells the number of heads.

    Raises:
        InputError: there are no weights, they cannot be read, are refused or belong to something else, or their
            configuration is unknown or contradicts `config_file`.
    """
    file = find_weights(Path(source), use_ema, "transformer")
    weights = plain_weights(choose_weights(read_content(file), file, use_ema))
    if transformer2d.is_transformer(weights):
        config, weights = transformer2d.from_transformer(weights, file)
        return Pretrained(DiT, agreed(config, file.with_name(COMPONENT_CONFIG), config_file), weights, file)
    torch_layout = is_torch_layout(_widening_weight(weights, file))
    config = _find_config(weights, file, torch_layout, config_file, like)
    return Pretrained(DiT, config, transpose_linear(weights) if torch_layout else weights, file)


def load_dit(source: Path, config_file: Path | None = None, use_ema: bool = True) -> DiT:
    """The network of `read_pretrained`, in eval mode.

    Raises:
        InputError: as there, or the weights are not those of the configuration.
    """
    return read_pretrained(source, config_file, use_ema).network()


def fine_tune(config: DiTConfig, source: Path) -> tuple[DiT, list[str]]:
    """A network for `config`, in training mode, that starts from trained weights, and the sentences of `start_from`.

    Args:
        config: the configuration to train.
        source: the trained weights, as `read_pretrained` takes them; the averaged ones where there are two.

    Raises:
        InputError: as `read_pretrained` and `start_from`.
    """
    pretrained, notes = start_from(config, read_pretrained(source, like=config))
    model = pretrained.network()
    model.train()
    return model, notes


def build_model(config: DiTConfig, pretrained: Path | None, resumed: Path | None) -> tuple[DiT, list[str]]:
    """The network that training begins with, and sentences about what was changed to fit.

    Args:
        config: the configuration to train.
        pretrained: weights to start from, as `read_pretrained` takes them; None for new ones.
        resumed: the checkpoint folder whose weights will be set, or None. It has its timestep convention, whatever
            `config` says: that of the weights it started from.
    """
    if resumed is not None:
        convention = DiTConfig.from_json(resumed / checkpoint.CONFIG).timestep_convention
        return DiT(dataclasses.replace(config, timestep_convention=convention)), []
    return (DiT(config), []) if pretrained is None else fine_tune(config, pretrained)


def start_from(config: DiTConfig, pretrained: Pretrained) -> tuple[Pretrained, list[str]]:
    """Trained weights made to fit another number of classes or another resolution.

    Args:
        config: the configuration to train.
        pretrained: the weights to start from.

    Returns:
        The weights, with `config` but for its timestep convention, which stays theirs: for another number of classes
        with new rows in the label table, drawn from Normal(0, 0.02) as a new network's, beside the trained null class;
        for another resolution with the sin-cos positions of that. And one sentence for each thing that differs.

    Raises:
        InputError: anything else differs.
    """
    trained, weights, notes = pretrained.config, dict(pretrained.weights), []
    for key in _SHAPE_KEYS:
        if getattr(trained, key) != getattr(config, key):
            raise InputError(
                f"{pretrained.source} has {key} {getattr(trained, key)}, the model to be trained "
                f"{getattr(config, key)}; choose the configuration of the trained weights"
            )
    if config.num_classes != trained.num_classes:
        weights[LABEL_TABLE] = _new_label_table(weights[LABEL_TABLE], config.num_classes)
        notes.append(
            f"the label table was made anew for {config.num_classes} classes in place of {trained.num_classes}; only "
            "the null class is kept"
        )
    if config.sample_size != trained.sample_size:
        weights["pos_embed"] = sincos_positions(config.hidden_size, config.sample_size // config.patch_size)
        notes.append(
            f"the positions were computed anew for latents of {config.sample_size} x {config.sample_size} in place of "
            f"{trained.sample_size} x {trained.sample_size}"
        )
    if config.timestep_convention != trained.timestep_convention:
        convention = trained.timestep_convention
        notes.append(
            f"the weights were trained with {convention} timestep frequencies: the model takes timestep_convention "
            f"{convention}"
        )
    config = dataclasses.replace(config, timestep_convention=trained.timestep_convention)
    return dataclasses.replace(pretrained, config=config, weights=weights), notes


def _new_label_table(table: np.ndarray, num_classes: int) -> np.ndarray:
    # A generator of its own: every process of a run draws the same.
    rows = np.random.default_rng(0).normal(0.0, 0.02, (num_classes, table.shape[1]))
    return np.concatenate([rows.astype(table.dtype), table[-1:]])


def _widening_weight(weights: dict[str, np.ndarray], file: Path) -> np.ndarray:
    name = "blocks.0.attn.qkv.weight"
    if name not in weights:
        raise InputError(f"{file} lacks the weight {name}: it holds no DiT")
    return weights[name]


def _find_config(
    weights: dict[str, np.ndarray], file: Path, torch_layout: bool, config_file: Path | None, like: DiTConfig | None
) -> DiTConfig:
    """The configuration of weights with DiT's names: what describes them, else what is given, else what they tell."""
    described = described_config(DiTConfig, file, torch_layout, config_file)
    if described is not None:
        return described
    if config_file is not None:
        config = DiTConfig.from_json(config_file)
        # What the official code trains has no other convention, and its files do not say.
        return dataclasses.replace(config, timestep_convention="official") if torch_layout else config
    if not torch_layout:
        raise InputError(f"no {checkpoint.CONFIG} describes {file}; give its configuration with --config_file")
    return infer_config(weights, file, like)
