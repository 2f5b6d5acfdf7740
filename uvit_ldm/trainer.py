"""Training a U-ViT with PaddleNLP's Trainer: arguments, the trainer, and what the entry point calls."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import paddle

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.training import SampleMaker
from latent_diffusion.images import captioned_grid, crop_then_resize
from latent_diffusion.objectives import Denoiser
from latent_diffusion.trainer import LatentDiffusionTrainer, run_training
from latent_diffusion.training_arguments import SuiteArguments, SuiteTrainingArguments
from latent_diffusion.vae import decode_latents, load_fitting_vae, load_vae_for_images, vae_settings

from .configuration import STABLE_DIFFUSION, UViTConfig
from .feature_files import read_prompts
from .features import CocoFeatures, open_features
from .image_sampling import ImageSampler
from .modeling import UViT
from .objective import make_objective
from .pretrained import build_model
from .prompts import load_encoder
from .sampling import make_sampler, sample_latents

# Logged images: the scale of the reference's evaluation (its s = 1), as samples are evaluated here too, and the one of
# pipelines' examples.
GUIDANCE_SCALES = (2.0, 7.5)
LOGGED_PROMPTS = 8


@dataclass
class UViTArguments(SuiteArguments):
    """Flags of U-ViT training."""

    feature_path: str = field(
        default="./data/coco256_features",
        metadata={"help": "folder that holds train, val and empty_context.npy, in either layout"},
    )
    unet_config_file: str = field(
        default="config/uvit_t2i_small_deep.json", metadata={"help": "model configuration (config/uvit_*.json)"}
    )
    model_max_length: Optional[int] = field(
        default=None, metadata={"help": "tokens of a prompt; without one the configuration's num_text_tokens"}
    )
    validation_prompts: Optional[list[str]] = field(
        default=None, metadata={"help": "draw these prompts for the log, in place of those in run_vis of the features"}
    )
    vae_name_or_path: str = field(
        default=f"{STABLE_DIFFUSION}/vae",
        metadata={"help": "VAE that decodes logged and evaluated images: a folder or a name on the hub"},
    )
    text_encoder_name_or_path: str = field(
        default=f"{STABLE_DIFFUSION}/text_encoder",
        metadata={"help": "text encoder of --validation_prompts: a folder or a name on the hub"},
    )
    tokenizer_name_or_path: str = field(
        default=f"{STABLE_DIFFUSION}/tokenizer",
        metadata={"help": "tokenizer of --validation_prompts: a folder or a name on the hub"},
    )
    num_inference_steps: int = field(default=50, metadata={"help": "sampling steps of logged and evaluated images"})

    def model_config(self) -> UViTConfig:
        """The configuration that the flags ask for.

        Raises:
            InputError: `--unet_config_file` is bad, or `--model_max_length` contradicts it.
        """
        config = UViTConfig.from_json(self.unet_config_file)
        if self.model_max_length not in (None, config.num_text_tokens):
            raise InputError(
                f"--model_max_length {self.model_max_length} contradicts {self.unet_config_file}, which has "
                f"num_text_tokens {config.num_text_tokens}"
            )
        return config


@dataclass
class UViTTrainingArguments(SuiteTrainingArguments):
    """PaddleNLP's training arguments with the output folder of U-ViT."""

    output_dir: str = field(
        default="./output_dir/uvit_t2i_small_deep", metadata={"help": "where checkpoints and logs are written"}
    )


class UViTTrainer(LatentDiffusionTrainer):
    """Conditions the backbone on the encoded prompts of the batch."""

    def create_optimizer(self, lr_scheduler=None):
        # PaddleNLP spares biases and norms from weight decay; the reference decays all parameters.
        self.set_optimizer_grouped_parameters(self.model.parameters())
        return super().create_optimizer(lr_scheduler)

    def denoiser(self, model, inputs: dict[str, paddle.Tensor]) -> Denoiser:
        return lambda x, t: model(x, t, inputs["contexts"])


def train(uvit_args: UViTArguments, args: UViTTrainingArguments) -> None:
    """Trains as the flags say; resumes from the newest checkpoint of the output folder if there is one.

    Raises:
        InputError: whatever is wrong with flags or features, before training starts.
    """
    config = uvit_args.model_config()
    store = open_features(uvit_args.feature_path, config)
    run_training(
        UViTTrainer,
        make_objective(),
        lambda resumed: store,
        lambda resumed: build_model(config, uvit_args.pretrained, resumed),
        lambda: _image_drawer(config, uvit_args, store, args.seed),
        lambda: _sample_maker(config, uvit_args),
        uvit_args,
        args,
    )


def _sample_maker(config: UViTConfig, uvit_args: UViTArguments) -> SampleMaker:
    """Draws images of the captions of the val split with DDIM, guided as the reference's evaluation is.

    Raises:
        InputError: the VAE or the features cannot be had.
    """
    captions = open_features(uvit_args.feature_path, config, "val")
    vae = load_fitting_vae(uvit_args.vae_name_or_path, config.in_channels)
    vae.register_to_config(scaling_factor=config.scaling_factor)
    sampler = make_sampler("ddim", uvit_args.num_inference_steps)

    def draw(model: UViT, seed: int, indices: Sequence[int]) -> np.ndarray:
        return ImageSampler(model, vae, sampler, GUIDANCE_SCALES[0], captions=captions).draw_samples(seed, indices)

    settings = {"sampling_steps": uvit_args.num_inference_steps} | vae_settings(vae) | captions.settings()
    return SampleMaker(draw, settings, (config.resolution, crop_then_resize))


def _image_drawer(config: UViTConfig, uvit_args: UViTArguments, store: CocoFeatures, seed: int):
    """A function that draws captioned grids with a model, or None where there is no usable VAE or prompt."""
    prompts = _prompts(config, uvit_args)
    vae = load_vae_for_images(uvit_args.vae_name_or_path, config.latent_shape) if prompts else None
    if vae is None:
        return None
    vae.register_to_config(scaling_factor=config.scaling_factor)
    texts, contexts = zip(*prompts[:LOGGED_PROMPTS], strict=True)
    sampler = make_sampler("ddim", uvit_args.num_inference_steps)

    def draw(model: UViT) -> dict[str, np.ndarray]:
        grids = {}
        for scale in GUIDANCE_SCALES:
            latents = sample_latents(
                model, np.stack(contexts), store.empty_context, sampler, guidance_scale=scale, seed=seed
            )
            grids[f"guidance_{scale:g}"] = np.asarray(captioned_grid(decode_latents(vae, latents), texts, columns=4))
        return grids

    return draw


def _prompts(config: UViTConfig, uvit_args: UViTArguments) -> list[tuple[str, np.ndarray]]:
    """Prompts to draw and what the text encoder makes of them; none, with one warning, where that cannot be had."""
    given = uvit_args.validation_prompts
    if not given:
        prompts = read_prompts(Path(uvit_args.feature_path), config.context_shape)
        if not prompts:
            print(
                f"note: no images will be logged: {uvit_args.feature_path} has no run_vis; --validation_prompts names "
                "prompts",
                file=sys.stderr,
            )
        return prompts
    try:
        encoder = load_encoder(uvit_args.text_encoder_name_or_path, uvit_args.tokenizer_name_or_path, config)
        return list(zip(given, encoder.encode(given), strict=True))
    except Exception as error:  # whatever is wrong with it, training can do without
        print(f"warning: no images will be logged: {error}", file=sys.stderr)
        return []
