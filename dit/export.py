"""A trained DiT as a pipeline folder of ppdiffusers or diffusers."""

from pathlib import Path

import numpy as np
import paddle

from latent_diffusion.errors import InputError
from latent_diffusion.files import new_folder, write_json
from latent_diffusion.reading import read_json
from latent_diffusion.vae import load_fitting_vae
from latent_diffusion.weights import transpose_linear, write_safetensors

from .configuration import DiTConfig
from .modeling import DiT
from .transformer2d import CONVENTION_KEY, PIPELINE_NULL_CLASS, to_transformer, transformer_arguments

IMAGENET_LABELS = Path(__file__).with_name("imagenet_labels.json")


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
        labels = read_json(path)
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
    library: str = "ppdiffusers",
) -> float:
    """Writes a folder that `DiTPipeline.from_pretrained` loads.

    Args:
        model: the network, in eval mode.
        vae_name_or_path: the VAE that goes with its latents.
        output_path: the folder, replaced when it exists.
        id2label: class names for `get_label_ids`.
        safe_serialization: safetensors in place of `model_state.pdparams`, for ppdiffusers; diffusers has no other.
        exact: use a transformer class of this project where the stock one has other timestep frequencies.
        library: whose pipeline it is, "ppdiffusers" or "diffusers" (of PyTorch).

    Returns:
        Largest absolute difference between the network's and the exported transformer's output on one random input.

    Raises:
        InputError: the transformer class cannot express the network, or the VAE is not usable.
    """
    from ppdiffusers.pipelines.dit.pipeline_dit import DiTPipeline
    from ppdiffusers.schedulers.scheduling_ddim import DDIMScheduler

    if exact and library == "diffusers":
        raise InputError("diffusers has no transformer with the official timestep frequencies; leave out --exact")
    vae = load_fitting_vae(vae_name_or_path, model.config.in_channels)
    transformer = to_ppdiffusers(model, exact)
    transformer.register_to_config(**{CONVENTION_KEY: model.config.timestep_convention})
    # No variance type: the pipeline hands over the noise alone, and DPM-Solver would cut a learned variance off it.
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    pipeline = DiTPipeline(transformer, vae, scheduler, id2label=id2label)
    labels = {} if id2label is None else {"id2label": {str(key): value for key, value in id2label.items()}}
    # save_pretrained leaves the labels out unless they are part of the configuration.
    pipeline.register_to_config(**labels)
    with new_folder(output_path, marker="model_index.json") as folder:
        if library == "diffusers":
            _save_for_diffusers(pipeline, model.config, labels, folder)
        else:
            pipeline.save_pretrained(str(folder), safe_serialization=safe_serialization)
    return _difference(model, transformer)


def to_ppdiffusers(model: DiT, exact: bool = False):
    """The network as ppdiffusers' `Transformer2DModel` (or its subclass with official frequencies), in eval mode.

    Raises:
        InputError: the network has a shape that the class cannot express.
    """
    from ppdiffusers.models.transformer_2d import Transformer2DModel as cls

    if exact and model.config.timestep_convention == "official":
        from .exact import OfficialDiTTransformer2DModel as cls
    transformer = cls(**transformer_arguments(model.config))
    transformer.set_state_dict(to_transformer(_arrays(model), model.config))
    transformer.eval()  # in training mode the class drops labels
    return transformer


def _save_for_diffusers(pipeline, config: DiTConfig, labels: dict, folder: Path) -> None:
    """Writes the parts of a ppdiffusers pipeline as `save_pretrained` of diffusers does."""
    components = {
        "transformer": (
            "DiTTransformer2DModel",
            transformer_arguments(config) | {CONVENTION_KEY: config.timestep_convention},
        ),
        "vae": ("AutoencoderKL", _public(pipeline.vae.config)),
        "scheduler": ("DDIMScheduler", _public(pipeline.scheduler.config)),
    }
    libraries = {name: ["diffusers", cls] for name, (cls, _) in components.items()}
    write_json(folder / "model_index.json", {"_class_name": "DiTPipeline"} | libraries | labels)
    for name, (cls, arguments) in components.items():
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        write_json(folder / name / file, {"_class_name": cls} | arguments)
    for name in ("transformer", "vae"):
        write_torch_weights(folder / name / "diffusion_pytorch_model.safetensors", getattr(pipeline, name))


def write_torch_weights(path: Path, layer: paddle.nn.Layer) -> None:
    """Writes the weights of a ppdiffusers network to a safetensors file of diffusers (PyTorch), as float32."""
    write_safetensors(path, transpose_linear(_arrays(layer)))


def _public(config: dict) -> dict:
    """The arguments that a ppdiffusers component was given; None stands for those that diffusers may not know."""
    return {key: value for key, value in config.items() if not key.startswith("_") and value is not None}


def _arrays(layer: paddle.nn.Layer) -> dict[str, np.ndarray]:
    return {name: tensor.astype("float32").numpy() for name, tensor in layer.state_dict().items()}


@paddle.no_grad()
def _difference(model: DiT, transformer) -> float:
    rng = np.random.default_rng(0)
    x = paddle.to_tensor(rng.standard_normal((2, *model.config.latent_shape), dtype=np.float32))
    t, y = paddle.to_tensor([17, 801]), paddle.to_tensor([0, model.config.num_classes - 1])
    own = model(x.astype(model.pos_embed.dtype), t, y).astype("float32")
    exported = transformer(x, timestep=t, class_labels=y).sample
    return float((own - exported).abs().max())
