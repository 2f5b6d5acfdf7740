"""Flags of SDXL LoRA fine-tuning: those of diffusers' `train_text_to_image_lora_sdxl.py`, on PaddleNLP's."""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Optional

from paddlenlp.trainer.trainer_utils import SchedulerType

from latent_diffusion.command_line import check_number
from latent_diffusion.configuration import VAE_DOWNSAMPLING
from latent_diffusion.errors import InputError
from latent_diffusion.training_arguments import SuiteArguments, SuiteTrainingArguments

from .objective import Prediction

# A layer of SDXL is less wide, and an image has fewer pixels on a side.
MOST_RANK, MOST_RESOLUTION = 4096, 2**14

# By flag the one without which it changes nothing.
_NEEDED = {
    "dataset_config_name": "dataset_name",
    "ema_decay": "use_ema",
    "ema_warmup": "use_ema",
    "num_validation_images": "validation_prompts",
    "validation_epochs": "validation_prompts",
}


@dataclass
class LoRAArguments(SuiteArguments):
    """Flags of SDXL LoRA fine-tuning."""

    _aliases: ClassVar[dict[str, tuple[str, ...]]] = {
        "vae_name_or_path": ("vae_name", "pretrained_vae_model_name_or_path"),
        "validation_prompts": ("validation_prompt",),
    }

    pretrained_model_name_or_path: Optional[str] = field(
        default=None, metadata={"help": "Stable Diffusion XL: a pipeline folder, or a name on the hub (required)"}
    )
    vae_name_or_path: Optional[str] = field(
        default=None, metadata={"help": "VAE in place of the pipeline's own: a folder or a name on the hub"}
    )
    dataset_name: Optional[str] = field(
        default=None,
        metadata={
            "help": "images with captions: a folder with parquet files (data/train-*.parquet) or with metadata.jsonl, "
            "or a name on Hugging Face's hub"
        },
    )
    dataset_config_name: Optional[str] = field(
        default=None, metadata={"help": "configuration of the data set, where it has several"}
    )
    train_data_dir: Optional[str] = field(
        default=None, metadata={"help": "folder of images with metadata.jsonl, in place of --dataset_name"}
    )
    image_column: str = field(default="image", metadata={"help": "column of the images"})
    caption_column: str = field(
        default="text", metadata={"help": "column of the captions; of a list of them one is drawn each time"}
    )
    max_train_samples: Optional[int] = field(
        default=None, metadata={"help": "train on so many images, drawn with --seed"}
    )
    resolution: int = field(default=1024, metadata={"help": "side in pixels that images are brought to"})
    center_crop: bool = field(default=False, metadata={"help": "crop the middle of images, not a random part"})
    random_flip: bool = field(default=False, metadata={"help": "mirror half of the images"})
    cache_latents: bool = field(
        default=False,
        metadata={
            "help": "encode images and captions once, into the output folder, not in every step; the crop of an image "
            "is then always the same"
        },
    )
    rank: int = field(default=4, metadata={"help": "rank of the LoRA matrices"})
    train_text_encoder: bool = field(default=False, metadata={"help": "LoRA for both text encoders, too"})
    snr_gamma: Optional[float] = field(
        default=None, metadata={"help": "weight timesteps by min(SNR, gamma) / SNR; 5 is usual"}
    )
    noise_offset: float = field(default=0.0, metadata={"help": "share of noise that is alike in all of a channel"})
    prediction_type: Optional[str] = field(
        default=None,
        metadata={
            "help": "what the network predicts, in place of what the pipeline's scheduler says",
            "choices": [prediction.value for prediction in Prediction],
        },
    )
    use_ema: bool = field(default=False, metadata={"help": "keep an exponential moving average of the LoRA weights"})
    validation_prompts: Optional[list[str]] = field(default=None, metadata={"help": "draw these prompts for the log"})
    num_validation_images: int = field(default=4, metadata={"help": "images of each prompt"})
    validation_epochs: int = field(default=1, metadata={"help": "draw them every so many epochs, and at the end"})
    image_logging_steps: Optional[int] = field(
        default=None, metadata={"help": "draw them every so many steps, in place of --validation_epochs; 0 for never"}
    )
    guidance_scale: float = field(default=5.0, metadata={"help": "scale of guidance of logged and evaluated images"})

    def __post_init__(self):
        super().__post_init__()
        if self.pretrained_model_name_or_path is None:
            raise InputError("--pretrained_model_name_or_path is required: a Stable Diffusion XL pipeline")
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise InputError("give the images and captions with --dataset_name or with --train_data_dir, one of them")
        for name, least, too_large in (
            ("resolution", VAE_DOWNSAMPLING, MOST_RESOLUTION + 1),
            ("rank", 1, MOST_RANK + 1),
            ("noise_offset", 0, 1e3),
            ("num_validation_images", 1, 1025),
            ("validation_epochs", 1, 1e9),
            ("guidance_scale", 0, 1e3),
        ):
            check_number(f"--{name}", getattr(self, name), least, too_large)
        if self.resolution % VAE_DOWNSAMPLING:
            raise InputError(
                f"--resolution {self.resolution} is no multiple of {VAE_DOWNSAMPLING}, by which the VAE downsamples"
            )
        if self.max_train_samples is not None:
            check_number("--max_train_samples", self.max_train_samples, 1)
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise InputError(f"--snr_gamma must be positive, not {self.snr_gamma}")
        self._check_effects()

    def _check_effects(self) -> None:
        """Refuses flags that would change nothing."""
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        for name, needed in _NEEDED.items():
            if name in given and needed not in given:
                raise InputError(f"--{name} has no effect without --{needed}; leave it out")
        if "validation_epochs" in given and self.image_logging_steps is not None:
            raise InputError("--validation_epochs has no effect with --image_logging_steps; leave one of them out")
        if self.image_logging_steps and not self.validation_prompts:
            raise InputError("--image_logging_steps has no effect without --validation_prompts; leave it out")


@dataclass
class LoRATrainingArguments(SuiteTrainingArguments):
    """PaddleNLP's training arguments with names and defaults of diffusers' script.

    Attributes:
        weights_dtype: of the frozen networks: "float32", or that of `mixed_precision` on a GPU.
    """

    _aliases: ClassVar[dict[str, tuple[str, ...]]] = {
        "per_device_train_batch_size": ("train_batch_size",),
        "max_steps": ("max_train_steps",),
        "save_steps": ("checkpointing_steps",),
        "save_total_limit": ("checkpoints_total_limit",),
        "lr_scheduler_type": ("lr_scheduler",),
        "warmup_steps": ("lr_warmup_steps",),
        "weight_decay": ("adam_weight_decay",),
        "recompute": ("gradient_checkpointing",),
    }

    do_train: bool = field(default=True, metadata={"help": "always so"})
    output_dir: str = field(
        default="output/sdxl_lora", metadata={"help": "where LoRA weights, checkpoints and logs are written"}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "images at a time on each device"})
    num_train_epochs: float = field(default=100, metadata={"help": "epochs, where --max_train_steps does not say more"})
    save_steps: int = field(default=500, metadata={"help": "write a checkpoint every so many steps"})
    logging_steps: int = field(default=10, metadata={"help": "log every so many steps"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip the gradient to this norm; -1 for no clipping"})
    weight_decay: float = field(default=1e-2, metadata={"help": "weight decay of AdamW"})
    warmup_steps: int = field(
        default=500, metadata={"help": "steps in which the learning rate rises, in schedules that begin so"}
    )
    mixed_precision: Optional[str] = field(
        default=None, metadata={"help": "no, fp16 or bf16 (GPU)", "choices": ["no", "fp16", "bf16"]}
    )
    resume_from_checkpoint: Optional[str] = field(
        default=None,
        metadata={
            "help": "a checkpoint folder, or the name of one in the output folder; latest, or nothing, for the newest "
            "there"
        },
    )

    def __post_init__(self):
        if self.mixed_precision is not None:
            asked = {"fp16": (True, False), "bf16": (False, True), "no": (False, False)}[self.mixed_precision]
            if (self.fp16 or self.bf16) and (self.fp16, self.bf16) != asked:
                raise InputError(f"--mixed_precision {self.mixed_precision} contradicts --fp16 or --bf16")
            self.fp16, self.bf16 = asked
        self._choose_warmup()
        self._find_checkpoint()
        super().__post_init__()
        self.weights_dtype = "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"

    def _find_checkpoint(self) -> None:
        """As diffusers' script does, which takes the newest one, or the name of one below the output folder."""
        asked = self.resume_from_checkpoint
        if asked == "latest":
            if self.overwrite_output_dir:
                raise InputError("--resume_from_checkpoint latest and --overwrite_output_dir exclude each other")
            self.resume_from_checkpoint = None
        elif asked is not None and not Path(asked).exists():
            named = Path(self.output_dir, Path(asked).name)
            if not named.is_dir():
                raise InputError(
                    f"--resume_from_checkpoint {asked} is no folder, and neither is {named}; give latest, or one"
                )
            self.resume_from_checkpoint = str(named)

    def _choose_warmup(self) -> None:
        if self.lr_scheduler_type == SchedulerType.CONSTANT.value:
            # Published commands say 0 steps, of a schedule that has no warmup anyway.
            self.warmup_steps = self.warmup_steps or type(self).warmup_steps
        elif self.warmup_ratio and not self._is_given("warmup_steps"):
            self.warmup_steps = 0

    def _choose_device(self) -> None:
        super()._choose_device()
        if self.cpu_dtype is not None:
            # The kernels for it are of this suite's own networks, which ppdiffusers' UNet is not.
            print("note: mixed precision has no effect on a CPU; computing in float32", file=sys.stderr)
            self.cpu_dtype = None
