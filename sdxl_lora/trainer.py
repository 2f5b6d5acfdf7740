"""Fine-tuning SDXL with LoRA with PaddleNLP's Trainer: the trainer, and what the entry point calls."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddlenlp.trainer import TrainerCallback

from latent_diffusion.checkpoint import check_config
from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.training import SampleMaker
from latent_diffusion.features import FeatureStore
from latent_diffusion.images import captioned_grid, crop_then_resize
from latent_diffusion.objectives import Denoiser
from latent_diffusion.progress import write_line
from latent_diffusion.sampling import sample_generators
from latent_diffusion.trainer import LatentDiffusionTrainer, run_training
from latent_diffusion.training_arguments import settle_steps
from latent_diffusion.vae import check_fits, encode_latents, load_vae, vae_settings

from .configuration import LoRAConfig
from .dataset import CaptionedImages, open_dataset
from .extraction import SAFE_VAE, cache_features
from .features import CachedFeatures, OnlineFeatures, TokenizedCaptions
from .image_sampling import ImageSampler
from .lora import read_lora, write_lora
from .modeling import SDXLLoRA
from .objective import WeightedPrediction
from .pretrained import (
    VAE,
    check_conditions,
    load_noise_schedule,
    load_scheduler,
    load_unet,
    part_of,
    read_unet_config,
    zeros_for_empty_prompt,
)
from .text_encoders import TextEncoders
from .training_arguments import LoRAArguments, LoRATrainingArguments

# In the output folder.
CACHE = "cache"

# The final loss is the mean over this many steps: that of a single one depends on its timesteps most of all.
LOSS_STEPS = 100

# Images, and captions, that are encoded at a time for the cache.
ENCODED_TOGETHER = 4


@dataclass(eq=False)
class Encoders:
    """What makes latents and contexts.

    Attributes:
        vae: an `AutoencoderKL`.
        text: both text encoders, or None where captions come encoded from a cache.
    """

    vae: Any
    text: TextEncoders | None


class LoRATrainer(LatentDiffusionTrainer):
    """Encodes what is not cached; at the end it writes the LoRA as both libraries load it, and says loss and speed.

    Args:
        encoders: for what batches do not hold.
        other arguments: of `LatentDiffusionTrainer`.
    """

    def __init__(self, *arguments, encoders: Encoders):
        super().__init__(*arguments)
        self.encoders = encoders
        # Asked for when something is wrong only: a GPU would have to be waited for.
        self._latents_are_finite = paddle.to_tensor(True)
        self._final_loss = FinalLossCallback()
        self.add_callback(self._final_loss)

    def create_optimizer(self, lr_scheduler=None):
        # The frozen ones among the LoRA layers have no gradients.
        self.set_optimizer_grouped_parameters([p for p in self.model.parameters() if not p.stop_gradient])
        return super().create_optimizer(lr_scheduler)

    def latents(self, inputs: dict[str, paddle.Tensor]) -> paddle.Tensor:
        if "latents" in inputs:
            return inputs["latents"]
        # PaddleNLP's mixed precision is around all of this: SDXL's own VAE would overflow in it.
        with paddle.amp.auto_cast(enable=False):
            latents = encode_latents(self.encoders.vae, inputs["images"], inputs["posterior_noise"])
        self._latents_are_finite = self._latents_are_finite.logical_and(paddle.isfinite(latents).all())
        return latents

    def advice(self) -> str:
        if self._latents_are_finite:
            return super().advice()
        return f"the VAE gives latents that are not finite, as SDXL's own does in float16: give {SAFE_VAE}"

    def denoiser(self, model, inputs: dict[str, paddle.Tensor]) -> Denoiser:
        condition = {name: inputs[name] for name in ("contexts", "pooled", "tokens", "tokens_2") if name in inputs}
        if "tokens" in condition and not self.model.config.train_text_encoder:
            with paddle.no_grad():
                contexts, pooled = self.encoders.text.encode(**condition)
            condition = {"contexts": contexts, "pooled": pooled}
        return lambda x, t: model(x, t, inputs["time_ids"], **condition)

    def train(self, resume_from_checkpoint: str | Path | None = None, *args, **kwargs):
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.is_world_process_zero():
            folder, summary = Path(self.args.output_dir), []
            if result is None:  # nothing was left to train; a killed run may not have come to this
                write_lora(folder, read_lora(resume_from_checkpoint))
            else:
                self.model.export_weights(folder, (self.ema or self.model).state_dict())
                summary = [self._summary()]
            for line in (f"LoRA weights of step {self._saved_step} are in {folder}", *summary):
                write_line(line)
        return result

    def _summary(self) -> str:
        mean, steps = self._final_loss.mean()
        loss = f"{mean:.4f} (mean of the last {steps} step{'s' * (steps > 1)})" if steps else "not measured"
        rate = self._meter.steady_rate()
        fps = "not measured: too few steps" if rate is None else f"{rate:.2f} images per second, steady state"
        return f"final loss {loss}, FPS {fps}"


class FinalLossCallback(TrainerCallback):
    """Remembers the last losses that were logged; also has the last step logged, wherever the run ends."""

    def __init__(self):
        self._step = 0
        # Steps since the log before, and their mean loss.
        self._logged: list[tuple[int, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "learning_rate" not in logs:  # not of steps
            return
        if "loss" in logs:  # not all of them were left out
            self._logged.append((state.global_step - self._step, logs["loss"]))
        self._step = state.global_step
        while sum(steps for steps, _ in self._logged[1:]) >= LOSS_STEPS:
            del self._logged[0]

    def mean(self) -> tuple[float, int]:
        """The mean loss over the last steps, and how many: `LOSS_STEPS` or a few more where there were so many."""
        steps = sum(count for count, _ in self._logged)
        return sum(count * loss for count, loss in self._logged) / max(steps, 1), steps


def train(lora_args: LoRAArguments, args: LoRATrainingArguments) -> None:
    """Trains as the flags say; resumes from the newest checkpoint of the output folder if there is one.

    Raises:
        InputError: whatever is wrong with flags, images or the base model, before training starts.
    """
    base = lora_args.pretrained_model_name_or_path
    if lora_args.validation_prompts and "visualdl" not in args.report_to:
        raise InputError("--validation_prompts has no effect without --report_to visualdl; leave it out")
    images = open_dataset(
        lora_args.dataset_name,
        lora_args.dataset_config_name,
        lora_args.train_data_dir,
        lora_args.image_column,
        lora_args.caption_column,
        lora_args.max_train_samples,
        args.seed,
    )
    # No other name for the text encoders: they would not be freed below.
    encoders = Encoders(text=TextEncoders.load(base, args.weights_dtype), vae=_load_vae(lora_args, args.weights_dtype))
    # Whatever can be wrong says so before images are encoded, which may take hours.
    _check_parts(encoders, lora_args)
    settle_steps(args, len(images))
    lora_args.image_logging_steps = _image_logging_steps(lora_args, args, len(images))
    needs_text = not lora_args.cache_latents or lora_args.train_text_encoder or args.eval_steps is not None

    def build_model(resumed: Path | None) -> tuple[SDXLLoRA, list[str]]:
        if not needs_text:
            encoders.text = None  # the prompts that are drawn are encoded by now
        unet = load_unet(base, args.weights_dtype)
        model = SDXLLoRA(unet, lora_args.rank, encoders.text if lora_args.train_text_encoder else None)
        return model, [f"starting from {base}"] if resumed is None else []

    run_training(
        functools.partial(LoRATrainer, encoders=encoders),
        make_objective(lora_args),
        lambda resumed: _open_store(images, encoders, lora_args, args, resumed),
        build_model,
        lambda: _image_drawer(_image_sampler(encoders.vae, lora_args), encoders.text, lora_args, args.seed),
        lambda: _sample_maker(_image_sampler(encoders.vae, lora_args), encoders.text, images, lora_args),
        lora_args,
        args,
    )


def make_objective(lora_args: LoRAArguments) -> WeightedPrediction:
    """What the flags ask for, on the noise that the base model was trained with."""
    schedule, prediction = load_noise_schedule(lora_args.pretrained_model_name_or_path, lora_args.prediction_type)
    return WeightedPrediction(schedule, prediction, lora_args.snr_gamma, lora_args.noise_offset)


def _load_vae(lora_args: LoRAArguments, dtype: str):
    """The VAE, in half precision only where its configuration says that it bears that."""
    vae = load_vae(_vae_name(lora_args))
    if dtype != "float32" and not vae.config.get("force_upcast", True):
        vae.to(dtype=dtype)
    return vae


def _vae_name(lora_args: LoRAArguments) -> str:
    return lora_args.vae_name_or_path or part_of(lora_args.pretrained_model_name_or_path, VAE)


def _check_parts(encoders: Encoders, lora_args: LoRAArguments) -> None:
    """Raises `InputError` unless the UNet takes what the VAE and the text encoders give."""
    config = read_unet_config(lora_args.pretrained_model_name_or_path)
    check_fits(encoders.vae, _vae_name(lora_args), config.get("in_channels", 4))
    check_conditions(config, encoders.text.context_shape[1], encoders.text.pooled_width)


def _open_store(
    images: CaptionedImages,
    encoders: Encoders,
    lora_args: LoRAArguments,
    args: LoRATrainingArguments,
    resumed: Path | None,
) -> FeatureStore:
    if not lora_args.cache_latents:
        return OnlineFeatures(
            images,
            encoders.text.tokenize,
            encoders.vae.config.latent_channels,
            resolution=lora_args.resolution,
            center_crop=lora_args.center_crop,
            random_flip=lora_args.random_flip,
        )
    if resumed is not None:  # encoding may take hours
        check_config(resumed, LoRAConfig(lora_args.rank, lora_args.train_text_encoder))
    trained_captions = None
    if lora_args.train_text_encoder:
        trained_captions = TokenizedCaptions(images, encoders.text.tokenize)
    cache = cache_features(
        Path(args.output_dir) / CACHE,
        images,
        encoders.vae,
        None if lora_args.train_text_encoder else encoders.text,
        resolution=lora_args.resolution,
        center_crop=lora_args.center_crop,
        random_flip=lora_args.random_flip,
        batch_size=ENCODED_TOGETHER,
        num_workers=max(args.dataloader_num_workers, 1),
        seed=args.seed,
        dtype="float32" if args.weights_dtype == "float32" else "float16",
    )
    return CachedFeatures(cache, trained_captions)


def _image_logging_steps(lora_args: LoRAArguments, args: LoRATrainingArguments, images: int) -> int:
    """After how many steps the validation prompts are drawn, 0 for never."""
    if lora_args.image_logging_steps is not None:
        return lora_args.image_logging_steps
    if not lora_args.validation_prompts:
        return 0
    return math.ceil(lora_args.validation_epochs * images / args.samples_per_step)


def _image_sampler(vae, lora_args: LoRAArguments) -> ImageSampler:
    base = lora_args.pretrained_model_name_or_path
    return ImageSampler(
        vae,
        load_scheduler(base),
        lora_args.resolution,
        lora_args.num_inference_steps,
        lora_args.guidance_scale,
        zeros_for_empty_prompt(base),
    )


def _image_drawer(sampler: ImageSampler, text: TextEncoders, lora_args: LoRAArguments, seed: int):
    """A function that draws the validation prompts with a model: a grid with a row a prompt."""
    prompts, columns = lora_args.validation_prompts, lora_args.num_validation_images
    frozen = None if lora_args.train_text_encoder else sampler.encode(prompts, text)

    def draw(model: SDXLLoRA) -> dict[str, np.ndarray]:
        condition, empty = frozen or sampler.encode(prompts, model.text_encoders)
        generators = sample_generators(seed, range(len(prompts) * columns))
        images = sampler.draw(model.unet, condition.repeated(columns), empty, generators)
        captions = [prompt for prompt in prompts for _ in range(columns)]
        return {"validation": np.asarray(captioned_grid(images, captions, columns))}

    return draw


def _sample_maker(
    sampler: ImageSampler, text: TextEncoders, images: CaptionedImages, lora_args: LoRAArguments
) -> SampleMaker:
    """Draws images of the captions that are trained on."""

    def draw(model: SDXLLoRA, seed: int, indices: Sequence[int]) -> np.ndarray:
        generators = sample_generators(seed, indices)
        captions = [images.caption(i % len(images), rng) for i, rng in zip(indices, generators, strict=True)]
        condition, empty = sampler.encode(captions, model.text_encoders or text)
        return sampler.draw(model.unet, condition, empty, generators)

    settings = {
        "sampling_steps": lora_args.num_inference_steps,
        "scheduler": type(sampler.scheduler).__name__,
        "guidance_scale": lora_args.guidance_scale,
        "zeros_for_empty_prompt": sampler.zeros_for_empty,
        "captions": images.fingerprint(),
        **vae_settings(sampler.vae),
    }
    return SampleMaker(draw, settings, (lora_args.resolution, crop_then_resize))
