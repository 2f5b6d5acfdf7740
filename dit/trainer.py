"""Training a DiT with PaddleNLP's Trainer: arguments, the trainer, and what the entry point calls."""

from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import paddle

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.training import SampleMaker
from latent_diffusion.images import image_grid
from latent_diffusion.objectives import Denoiser
from latent_diffusion.trainer import LatentDiffusionTrainer, run_training
from latent_diffusion.training_arguments import SuiteArguments, SuiteTrainingArguments
from latent_diffusion.vae import decode_latents, load_fitting_vae, load_vae_for_images

from .classes import spread_classes
from .configuration import DiTConfig
from .evaluation import make_sample_maker
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
            return DiTConfig.from_name_or_file(DEFAULT_MODEL, self.resolution)
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
    config = dit_args.model_config()
    store = open_features(dit_args.feature_path, config, dit_args.use_flip)
    run_training(
        DiTTrainer,
        make_objective(),
        lambda resumed: store,
        lambda resumed: build_model(config, dit_args.pretrained, resumed),
        lambda: _image_drawer(config, dit_args, args.seed),
        lambda: _sample_maker(config, dit_args),
        dit_args,
        args,
    )


def _sample_maker(config: DiTConfig, dit_args: DiTArguments) -> SampleMaker:
    """What makes the samples of evaluations.

    Raises:
        InputError: the VAE cannot be had.
    """
    vae = load_fitting_vae(dit_args.vae_name_or_path, config.in_channels)
    return make_sample_maker(config, vae, dit_args.num_inference_steps)


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
