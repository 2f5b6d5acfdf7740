"""The base pipeline of `make demo-lora`: a tiny Stable Diffusion XL that draws digits, in colors as they come."""

from pathlib import Path
from typing import Any

import numpy as np
import paddle
from ppdiffusers import AutoencoderKL, StableDiffusionXLPipeline

from latent_diffusion.features import stack
from latent_diffusion.schedules import NoiseSchedule
from latent_diffusion.vae import sample_moments
from sdxl_lora.image_sampling import Condition
from sdxl_lora.objective import Prediction, WeightedPrediction
from sdxl_lora.text_encoders import TextEncoders

from .autoencoder import encode_all
from .captions import WORDS
from .colors import COLOR_WORDINGS, COLORS, PLAIN_WORDINGS
from .fit import fit
from .text_encoder import spread_words
from .tiny_sdxl import write_pipeline

STEPS = 600
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 2e-3
# Share of captions that become zeros, which is SDXL's empty prompt, for guidance.
DROPPED = 0.1
SEED = 0


def train_base(images: np.ndarray, labels: np.ndarray, vae: AutoencoderKL, folder: Path, steps: int = STEPS) -> None:
    """Writes a pipeline whose UNet is trained, all of it, on digits and what they are called.

    Args:
        images: on black, uint8 `[N, 64, 64, 3]`.
        labels: the digits, int `[N]`.
        vae: downsamples by 8.
        folder: for `StableDiffusionXLPipeline.from_pretrained`; it appears once whole.
        steps: of the optimizer.
    """

    def train(pipeline: StableDiffusionXLPipeline) -> None:
        # After 800 steps on white digits 98 % were read right, but 45 % where noise was predicted, as by SDXL.
        pipeline.scheduler.register_to_config(prediction_type=Prediction.VELOCITY.value)
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            spread_words(encoder)
        _fit(pipeline.unet, Batches(pipeline, images, labels), steps)

    # The names of colors mean nothing yet, but each is a word.
    write_pipeline(folder, [*PLAIN_WORDINGS, *COLOR_WORDINGS, *WORDS, *COLORS], vae, train)


class Batches:
    """Random batches; images and captions are encoded once."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, images: np.ndarray, labels: np.ndarray):
        vae, side = pipeline.vae, images.shape[1]
        self._moments, self._labels, self._scale = encode_all(vae, images), labels, vae.config.scaling_factor
        encoders = TextEncoders(
            (pipeline.text_encoder, pipeline.text_encoder_2), (pipeline.tokenizer, pipeline.tokenizer_2)
        )
        # Wording by wording, the ten digits of each.
        self._captions = Condition.of([text.format(digit=word) for text in PLAIN_WORDINGS for word in WORDS], encoders)
        # The whole of an image, in its own size.
        self._time_ids = paddle.to_tensor([[side, side, 0, 0, side, side]] * BATCH_SIZE, dtype="float32")

    def draw(self, rng: np.random.Generator) -> tuple[paddle.Tensor, dict[str, Any]]:
        """Scaled latents, float32 `[B, 4, 8, 8]`, and what the UNet is told about them: its arguments after t."""
        rows = rng.integers(len(self._moments), size=BATCH_SIZE)
        wordings = rng.integers(len(PLAIN_WORDINGS), size=BATCH_SIZE)
        captions = paddle.to_tensor(len(WORDS) * wordings + self._labels[rows])
        kept = paddle.to_tensor(rng.random((BATCH_SIZE, 1)) >= DROPPED).astype("float32")
        condition = {
            "encoder_hidden_states": self._captions.contexts[captions] * kept[:, None],
            "added_cond_kwargs": {
                "text_embeds": self._captions.pooled[captions] * kept,
                "time_ids": self._time_ids,
            },
        }
        moments = self._moments[rows]
        noise = rng.standard_normal(np.split(moments, 2, axis=1)[0].shape, dtype=np.float32)
        return paddle.to_tensor(sample_moments(moments, noise)) * self._scale, condition


def _fit(unet: Any, batches: Batches, steps: int) -> None:
    objective = WeightedPrediction(NoiseSchedule.scaled_linear(), Prediction.VELOCITY)
    rng = np.random.default_rng(SEED)
    unet.train()
    fit(
        unet,
        lambda: _loss(unet, objective, *batches.draw(rng), rng),
        steps,
        PEAK_LEARNING_RATE,
        rising=0.1,
        description="base pipeline",
        beta2=0.99,
    )
    unet.eval()


def _loss(
    unet: Any,
    objective: WeightedPrediction,
    latents: paddle.Tensor,
    condition: dict[str, Any],
    rng: np.random.Generator,
) -> paddle.Tensor:
    drawn = stack([objective.draw(rng, tuple(latents.shape[1:])) for _ in range(len(latents))])
    steps = {name: paddle.to_tensor(value) for name, value in drawn.items()}
    return objective.losses(lambda x, t: unet(x, t, **condition).sample, latents, **steps)["loss"].mean()
