"""Training a DiT with PaddleNLP's Trainer: arguments, the trainer, and what the entry point calls."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import paddle
from paddlenlp.trainer import set_seed

from latent_diffusion.ema import EMA
from latent_diffusion.errors import InputError
from latent_diffusion.images import image_grid
from latent_diffusion.objectives import Denoiser
from latent_diffusion.trainer import LatentDiffusionTrainer, prepare_output
from latent_diffusion.training_arguments import SuiteArguments, SuiteTrainingArguments
from latent_diffusion.vae import decode_latents, load_vae_for_images

from .classes import spread_classes
from .configuration import DiTConfig
from .features import open_features
from .modeling import DiT
from .objective import make_objective
from .pretrained import build_model
from .sampling import make_sampler, sample_latents

DEFAULT_MODEL = "DiT-XL/2"
DEFAULT_OUTPUT_DIR = "./image_generation_dit_output_trainer"

# Logged images: none, and the paper's scale for pictures to look at.
GUIDANCE_SCALES = (1.0, 4.0)
LOGGED_CLASSES = 8


@dataclass
class DiTArguments(SuiteArguments):
    """Flags of DiT training."""

    feature_path: str = field(
        default="./data/fastdit_imagenet256",
        metadata={"help": "folder that holds imagenet<resolution>_features and imagenet<resolution>_labels"},
    )
    config_file: Optional[str] = field(
        default=None, metadata={"help": f"model configuration (config/*.json); without one, {DEFAULT_MODEL}"}
    )
    pretrained_model_name_or_path: Optional[str] = field(
        default=None,
        metadata={
            "help": "start from these weights: a checkpoint folder, an official .pt file, or a pipeline folder of "
            "ppdiffusers or diffusers"
        },
    )
    resolution: Optional[int] = field(
        default=None, metadata={"help": "side of the images in pixels; without one the configuration's, or 256"}
    )
    use_flip: bool = field(
        default=False, metadata={"help": "take mirrored latents half of the time, where extraction wrote them"}
    )

    def model_config(self) -> DiTConfig:
        """The configuration that the flags ask for.

        Raises:
            InputError: `--config_file` is bad, or `--resolution` contradicts it.
        """
        if self.config_file is None:
            return DiTConfig.from_name(DEFAULT_MODEL, image_size=self.resolution or 256)
        config = DiTConfig.from_json(self.config_file)
        if self.resolution not in (None, config.resolution):
            raise InputError(
                f"--resolution {self.resolution} contradicts {self.config_file}: its sample_size is for "
                f"images of {config.resolution} pixels"
            )
        return config


@dataclass
class DiTTrainingArguments(SuiteTrainingArguments):
    """PaddleNLP's training arguments with the output folder of DiT."""

    output_dir: str = field(default=DEFAULT_OUTPUT_DIR, metadata={"help": "where checkpoints and logs are written"})


class DiTTrainer(LatentDiffusionTrainer):
    """Conditions the backbone on the class labels of the batch."""

    def denoiser(self, model, inputs: dict[str, paddle.Tensor]) -> Denoiser:
        return lambda x, t: model(x, t, inputs["labels"])


def train(dit_args: DiTArguments, args: DiTTrainingArguments) -> None:
    """Trains as the flags say; resumes from the newest checkpoint of the output folder if there is one.

    Raises:
        InputError: whatever is wrong with flags or features, before training starts.
    """
    if not args.do_train:
        raise InputError("nothing to do: give --do_train")
    config = dit_args.model_config()
    store = open_features(dit_args.feature_path, config, dit_args.use_flip)
    resume = prepare_output(args)
    logs_images = dit_args.image_logging_steps > 0 and args.should_save and "visualdl" in args.report_to
    draw = _image_drawer(config, dit_args, args.seed) if logs_images else None

    set_seed(args.seed)
    pretrained = dit_args.pretrained_model_name_or_path
    model, notes = build_model(config, pretrained and Path(pretrained), resume)
    if args.should_save:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    if dit_args.enable_xformers_memory_efficient_attention:
        model.enable_xformers_memory_efficient_attention()
    ema = EMA(model, dit_args.ema_decay, dit_args.ema_warmup) if dit_args.use_ema else None
    trainer = DiTTrainer(model, make_objective(), store, ema, args)
    if draw:
        trainer.log_images(draw, dit_args.image_logging_steps)
    trainer.train(resume)


def _image_drawer(config: DiTConfig, dit_args: DiTArguments, seed: int):
    """A function that draws grids of images with a model, or None where there is no usable VAE."""
    vae = load_vae_for_images(dit_args.vae_name_or_path, config.latent_shape)
    if vae is None:
        return None
    labels = spread_classes(config.num_classes, LOGGED_CLASSES)
    sampler = make_sampler("ddim", dit_args.num_inference_steps)

    def draw(model: DiT) -> dict[str, np.ndarray]:
        grids = {}
        for scale in GUIDANCE_SCALES:
            latents = sample_latents(model, labels, sampler, guidance_scale=scale, seed=seed)
            grid = image_grid(decode_latents(vae, latents), columns=4)
            grids[f"guidance_{scale:g}"] = np.asarray(grid)
        return grids

    return draw
