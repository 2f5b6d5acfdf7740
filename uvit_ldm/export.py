"""A trained U-ViT as a text-to-image pipeline folder of ppdiffusers."""

import math
from pathlib import Path

import numpy as np
import paddle

from latent_diffusion.errors import InputError
from latent_diffusion.files import new_folder, write_json
from latent_diffusion.pretrained import COMPONENT_CONFIG
from latent_diffusion.text_encoder import TextEncoder, save_tokenizer
from latent_diffusion.vae import load_fitting_vae
from latent_diffusion.weights import write_paddle

from .configuration import PIPELINES, SCALING_KEY, STOCK_PIPELINE, UViTConfig
from .modeling import UViT
from .pretrained import COMPONENT
from .sampling import ddim_scheduler

# What the stock pipeline divides latents by, whatever the VAE's configuration says, and its most tokens.
_STOCK_SCALING_FACTOR = 0.18215
_STOCK_TOKENS = 77

_MODEL_FILE = "model_state.pdparams"


def export_pipeline(
    model: UViT, vae_name_or_path: str, text_encoder: TextEncoder, output_path: Path, pipeline: str
) -> float:
    """Writes a folder that `<pipeline>.from_pretrained` loads.

    Args:
        model: the network, in eval mode.
        vae_name_or_path: the VAE that goes with its latents.
        text_encoder: the text encoder and tokenizer that go with its contexts.
        output_path: the folder, replaced when it exists.
        pipeline: one of `PIPELINES`.

    Returns:
        Largest absolute difference between the network's and the exported network's output on one random input.

    Raises:
        InputError: the VAE or the text encoder does not fit the network, or the pipeline cannot have its tokens.
    """
    config, stock = model.config, pipeline == STOCK_PIPELINE
    vae = load_fitting_vae(vae_name_or_path, config.in_channels)
    _check_text_encoder(text_encoder, config, stock)
    if stock:
        rescale_latents(vae, config.scaling_factor / _STOCK_SCALING_FACTOR)
    vae.register_to_config(scaling_factor=_STOCK_SCALING_FACTOR if stock else config.scaling_factor)
    scheduler = ddim_scheduler()
    encoder = PIPELINES[pipeline]
    with new_folder(output_path, marker="model_index.json") as folder:
        vae.save_pretrained(str(folder / "vqvae"), safe_serialization=False)
        _save_text_encoder(text_encoder.model, folder / encoder)
        save_tokenizer(text_encoder.tokenizer, folder / "tokenizer")
        scheduler.save_pretrained(str(folder / "scheduler"))
        _save_network(model, folder / COMPONENT)
        own = "ppdiffusers" if stock else "uvit_ldm.pipeline"
        write_json(
            folder / "model_index.json",
            {
                "_class_name": pipeline,
                "vqvae": [own, "AutoencoderKL"],
                encoder: ["ppdiffusers.transformers" if stock else own, "CLIPTextModel"],
                COMPONENT: [own, "UViTT2IModel"],
                "scheduler": ["ppdiffusers", "DDIMScheduler"],
                "tokenizer": ["ppdiffusers.transformers", type(text_encoder.tokenizer).__name__],
            },
        )
        return _difference(model, folder / COMPONENT, stock)


def rescale_latents(vae, ratio: float) -> None:
    """Changes a VAE's weights such that its latents are `ratio` times what they were, and decode to the same images."""
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    channels = vae.config.latent_channels
    # Means are multiplied; log variances follow. The decoder undoes it where it begins.
    factors = np.repeat([ratio, 1.0], channels).astype("float32")
    offsets = np.repeat([0.0, 2 * math.log(ratio)], channels).astype("float32")
    quant.weight.set_value(quant.weight.numpy() * factors[:, None, None, None])
    quant.bias.set_value(quant.bias.numpy() * factors + offsets)
    post_quant.weight.set_value(post_quant.weight.numpy() / np.float32(ratio))


def _check_text_encoder(encoder: TextEncoder, config: UViTConfig, stock: bool) -> None:
    if encoder.width != config.clip_dim:
        raise InputError(
            f"the text encoder gives contexts of width {encoder.width}, the network takes clip_dim {config.clip_dim}"
        )
    if encoder.length != config.num_text_tokens:
        raise InputError(
            f"--model_max_length {encoder.length} contradicts the network's num_text_tokens {config.num_text_tokens}"
        )
    if stock and config.num_text_tokens > _STOCK_TOKENS:
        raise InputError(
            f"{STOCK_PIPELINE} takes at most {_STOCK_TOKENS} tokens, the network {config.num_text_tokens}; leave out "
            "--pipeline"
        )


def _save_text_encoder(model, folder: Path) -> None:
    model.save_pretrained(str(folder))
    # Its former name, which PaddleNLP still reads and published folders have.
    (folder / "config.json").rename(folder / "model_config.json")


def _save_network(model: UViT, folder: Path) -> None:
    folder.mkdir()
    arguments = model.config.to_dict()
    scaling_factor = arguments.pop("scaling_factor")
    write_json(folder / COMPONENT_CONFIG, {"_class_name": "UViTT2IModel"} | arguments | {SCALING_KEY: scaling_factor})
    write_paddle(folder / _MODEL_FILE, model.state_dict())


@paddle.no_grad()
def _difference(model: UViT, folder: Path, stock: bool) -> float:
    if stock:
        from ppdiffusers.models.uvit_t2i import UViTT2IModel as cls
    else:
        from .pipeline import UViTT2IModel as cls
    exported = cls.from_pretrained(str(folder))
    rng = np.random.default_rng(0)
    x, context = (
        paddle.to_tensor(rng.standard_normal((2, *shape), dtype=np.float32))
        for shape in (model.config.latent_shape, model.config.context_shape)
    )
    t = paddle.to_tensor([500, 500])
    return float((model(x, t, context) - exported(x, t, context).sample).abs().max())
