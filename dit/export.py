"""A trained DiT as a ppdiffusers pipeline folder; the only code that knows ppdiffusers' parameter names."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import paddle

from latent_diffusion import checkpoint
from latent_diffusion.errors import InputError
from latent_diffusion.files import new_folder
from latent_diffusion.vae import check_channels, load_vae

from .configuration import DiTConfig
from .modeling import DiT
from .official import TORCH_SUFFIXES, load_official

# DiTPipeline takes this label for the null class, whatever the number of classes.
PIPELINE_NULL_CLASS = 1000

IMAGENET_LABELS = Path(__file__).with_name("imagenet_labels.json")


def find_weights(model_file: Path, use_ema: bool) -> Path:
    """The weight file meant by a checkpoint folder, an output folder (its newest checkpoint) or a file.

    Raises:
        InputError: there is none.
    """
    if model_file.is_file():
        return model_file
    if not model_file.is_dir():
        raise InputError(
            f"the model file {model_file} does not exist; give a checkpoint folder or a weight file with --model_file"
        )
    folder = checkpoint.newest_checkpoint(model_file) or model_file
    path = folder / (checkpoint.EMA_MODEL if use_ema else checkpoint.MODEL)
    if not path.is_file():
        hint = "; --use_ema False takes the raw weights" if use_ema and (folder / checkpoint.MODEL).is_file() else ""
        raise InputError(f"{path} does not exist: {model_file} is no checkpoint folder and holds none with it{hint}")
    return path


def find_config(weights_file: Path, config_file: Path | None) -> DiTConfig:
    """The configuration of a weight file: of a checkpoint, the one beside it; else the given one.

    Raises:
        InputError: there is neither, or the two disagree.
    """
    official = weights_file.suffix in TORCH_SUFFIXES
    own = weights_file.with_name(checkpoint.CONFIG)
    if own.is_file() and not official:
        config = DiTConfig.from_json(own)
        if config_file is not None and (given := DiTConfig.from_json(config_file)) != config:
            key = next(k for k, value in config.to_dict().items() if given.to_dict()[k] != value)
            raise InputError(f"{config_file} contradicts {own}, which describes the checkpoint, in {key!r}")
        return config
    if config_file is None:
        raise InputError(f"no {checkpoint.CONFIG} describes {weights_file}; give its configuration with --config_file")
    config = DiTConfig.from_json(config_file)
    # What the official code trains has no other convention, and its files do not say.
    return dataclasses.replace(config, timestep_convention="official") if official else config


def load_network(weights_file: Path, config: DiTConfig) -> DiT:
    """A DiT in eval mode with the weights of a Paddle file, or of an official `.pt` file.

    Raises:
        InputError: the weights are not those of the configuration.
    """
    model = DiT(config)
    load = load_official if weights_file.suffix in TORCH_SUFFIXES else checkpoint.load_weights
    load(weights_file, model)
    model.eval()
    return model


def read_labels(path: Path | None, num_classes: int) -> dict[int, str] | None:
    """Class names by class id, from a JSON object or list; ImageNet's for 1000 classes when no file is given.

    Raises:
        InputError: the file cannot be read or names classes the model has not.
    """
    if path is None:
        if num_classes != PIPELINE_NULL_CLASS:
            return None
        path = IMAGENET_LABELS
    try:
        labels = json.loads(path.read_text())
        items = enumerate(labels) if isinstance(labels, list) else labels.items()
        labels = {int(key): str(value) for key, value in items}
    except OSError as error:
        raise InputError(f"cannot read the label file {path}: {error.strerror}") from None
    except (ValueError, AttributeError) as error:
        raise InputError(f"the label file {path} must hold a JSON object of class ids and names: {error}") from None
    if outside := [key for key in labels if not 0 <= key < num_classes]:
        raise InputError(
            f"the label file {path} names class {outside[0]}; the model has classes 0 to {num_classes - 1}"
        )
    return labels


def export_pipeline(
    model: DiT,
    vae_name_or_path: str,
    output_path: Path,
    id2label: dict[int, str] | None,
    safe_serialization: bool = False,
    exact: bool = False,
) -> float:
    """Writes a folder that `DiTPipeline.from_pretrained` loads.

    Args:
        model: the network, in eval mode.
        vae_name_or_path: the VAE that goes with its latents.
        output_path: the folder, replaced when it exists.
        id2label: class names for `get_label_ids`.
        safe_serialization: safetensors in place of `model_state.pdparams`.
        exact: use a transformer class of this project where the stock one has other timestep frequencies.

    Returns:
        Largest absolute difference between the network's and the exported transformer's output on one random input.

    Raises:
        InputError: ppdiffusers' transformer cannot express the network, or the VAE is not usable.
    """
    from ppdiffusers.pipelines.dit.pipeline_dit import DiTPipeline
    from ppdiffusers.schedulers.scheduling_ddim import DDIMScheduler

    vae = load_vae(vae_name_or_path)
    check_channels(vae, vae_name_or_path, model.config.in_channels)
    transformer = to_ppdiffusers(model, exact)
    # No variance type: the pipeline hands over the noise alone, and DPM-Solver would cut a learned variance off it.
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    pipeline = DiTPipeline(transformer, vae, scheduler, id2label=id2label)
    if id2label is not None:
        # save_pretrained leaves the labels out unless they are part of the configuration.
        pipeline.register_to_config(id2label={str(key): value for key, value in id2label.items()})
    with new_folder(output_path, marker="model_index.json") as folder:
        pipeline.save_pretrained(str(folder), safe_serialization=safe_serialization)
    return _difference(model, transformer)


def to_ppdiffusers(model: DiT, exact: bool = False):
    """The network as ppdiffusers' `Transformer2DModel` (or its subclass with official frequencies), in eval mode.

    Raises:
        InputError: the network has a shape that the class cannot express.
    """
    from ppdiffusers.models.transformer_2d import Transformer2DModel

    config = model.config
    if config.num_classes > PIPELINE_NULL_CLASS:
        raise InputError(
            f"DiTPipeline takes class {PIPELINE_NULL_CLASS} for the null class: a model of {config.num_classes} "
            "classes cannot be exported"
        )
    if config.mlp_ratio != 4.0:
        raise InputError(f"ppdiffusers' transformer has an MLP ratio of 4; the model has {config.mlp_ratio:g}")
    cls = Transformer2DModel
    if exact and config.timestep_convention == "official":
        from .exact import OfficialDiTTransformer2DModel as cls
    transformer = cls(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=PIPELINE_NULL_CLASS,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-6,  # the class's default of 1e-5 is not DiT's
    )
    weights = {name: tensor.astype("float32").numpy() for name, tensor in model.state_dict().items()}
    transformer.set_state_dict(ppdiffusers_weights(weights, config))
    transformer.eval()  # in training mode the class drops labels
    return transformer


def ppdiffusers_weights(weights: dict[str, np.ndarray], config: DiTConfig) -> dict[str, np.ndarray]:
    """Renames the weights of a `DiT` for `Transformer2DModel`; Linear weights are [in, out] in both."""
    renamed = {}

    def move(source: str, target: str) -> None:
        for kind in ("weight", "bias"):
            renamed[f"{target}.{kind}"] = weights[f"{source}.{kind}"]

    move("x_embedder.proj", "pos_embed.proj")
    move("final_layer.adaLN_modulation.1", "proj_out_1")
    move("final_layer.linear", "proj_out_2")
    label_table = _label_table(weights)
    for i in range(config.num_layers):
        source, target = f"blocks.{i}", f"transformer_blocks.{i}"
        # The class gives every block its own timestep and label embedding.
        move("t_embedder.mlp.0", f"{target}.norm1.emb.timestep_embedder.linear_1")
        move("t_embedder.mlp.2", f"{target}.norm1.emb.timestep_embedder.linear_2")
        renamed[f"{target}.norm1.emb.class_embedder.embedding_table.weight"] = label_table
        move(f"{source}.adaLN_modulation.1", f"{target}.norm1.linear")
        move(f"{source}.attn.proj", f"{target}.attn1.to_out.0")
        move(f"{source}.mlp.fc1", f"{target}.ff.net.0.proj")
        move(f"{source}.mlp.fc2", f"{target}.ff.net.2")
        for kind in ("weight", "bias"):
            parts = np.split(weights[f"{source}.attn.qkv.{kind}"], 3, axis=-1)
            for name, part in zip("qkv", parts, strict=True):
                renamed[f"{target}.attn1.to_{name}.{kind}"] = part
    return renamed


def _label_table(weights: dict[str, np.ndarray]) -> np.ndarray:
    """The label table [K + 1, D] as [1001, D]: the null row, K, also fills every row from K to 1000."""
    table = weights["y_embedder.embedding_table.weight"]
    missing = PIPELINE_NULL_CLASS + 1 - len(table)
    return np.concatenate([table, np.repeat(table[-1:], missing, axis=0)])


@paddle.no_grad()
def _difference(model: DiT, transformer) -> float:
    rng = np.random.default_rng(0)
    x = paddle.to_tensor(rng.standard_normal((2, *model.config.latent_shape), dtype=np.float32))
    t, y = paddle.to_tensor([17, 801]), paddle.to_tensor([0, model.config.num_classes - 1])
    own = model(x.astype(model.pos_embed.dtype), t, y).astype("float32")
    exported = transformer(x, timestep=t, class_labels=y).sample
    return float((own - exported).abs().max())
