"""A small AutoencoderKL for the digits: 64x64 pixels to latents of 4x8x8, trained in about a minute on 2 cores."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from ppdiffusers import AutoencoderKL

from latent_diffusion.errors import InputError
from latent_diffusion.files import new_folder
from latent_diffusion.progress import progress
from latent_diffusion.vae import encode_moments, to_pixels

from .digits import IMAGE_SIZE

STEPS = 400
# Paddle's convolutions work image by image on a CPU: a larger batch sees no more images per second.
BATCH_SIZE = 8
PEAK_LEARNING_RATE = 4e-3
# The KL term is averaged over the latent values, the reconstruction error over the pixels. With 1e-3 the channels'
# deviations run from 0.5 to 2.0; with 1e-2 from 0.6 to 1.4, around mean 0, and digits read as well as before.
KL_WEIGHT = 1e-2
SEED = 0


def train_autoencoder(images: np.ndarray, output_dir: Path, steps: int = STEPS) -> AutoencoderKL:
    """Trains an autoencoder, saves it in `output_dir` and returns it in eval mode.

    Args:
        images: uint8 `[N, 64, 64, 3]`, the training images.
        output_dir: a folder for `AutoencoderKL.from_pretrained`; it appears once whole, in place of an older one.
        steps: optimizer steps.

    `scaling_factor` in the saved config is 1 / std of the latents of `images`, so `scaling_factor * latents`, float32
    `[N, 4, 8, 8]`, has unit standard deviation.

    Raises:
        InputError: images is empty or has another shape or type.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or not len(images):
        raise InputError(
            f"images are {images.dtype} {list(images.shape)}; give uint8 [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], N > 0."
        )
    paddle.seed(SEED)
    model = build_autoencoder()
    _fit(model, images, steps)
    model.eval()
    model.register_to_config(scaling_factor=1 / _latent_std(model, images))
    with new_folder(Path(output_dir), marker="config.json") as folder:
        model.save_pretrained(str(folder), safe_serialization=False)
    return model


def build_autoencoder() -> AutoencoderKL:
    """A fresh autoencoder with 41,000 weights: images `[N, 3, 64, 64]` in -1..1 to latents `[N, 4, 8, 8]`."""
    return AutoencoderKL(
        # Four blocks downsample by 8, the factor that ppdiffusers' latent diffusion pipelines assume.
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        # Time goes into convolutions at full resolution, and the digits hold 8x8 pixels' worth of detail: so few
        # channels there, and an encoder whose blocks only downsample (no residual layers, hence one width).
        layers_per_block=0,
        down_block_out_channels=(16, 16, 16, 16),
        up_block_out_channels=(4, 4, 8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
    )


def _fit(model: AutoencoderKL, images: np.ndarray, steps: int) -> None:
    schedule = paddle.optimizer.lr.OneCycleLR(PEAK_LEARNING_RATE, total_steps=steps, phase_pct=0.15)
    optimizer = paddle.optimizer.Adam(
        schedule, parameters=model.parameters(), grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0)
    )
    batches = _batches(images)
    with progress(total=steps, desc="autoencoder", unit="step") as bar:
        for step in range(1, steps + 1):
            loss = _loss(model, next(batches))
            loss.backward()
            optimizer.step()
            optimizer.clear_grad(set_to_zero=False)
            schedule.step()
            if step % 50 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            bar.update()


def _batches(images: np.ndarray) -> Iterator[np.ndarray]:
    """Endless shuffled batches; each epoch's incomplete last batch is kept."""
    generator = np.random.default_rng(SEED)
    while True:
        order = generator.permutation(len(images))
        for start in range(0, len(order), BATCH_SIZE):
            yield images[order[start : start + BATCH_SIZE]]


def _loss(model: AutoencoderKL, images: np.ndarray) -> paddle.Tensor:
    pixels = to_pixels(images)
    posterior = model.encode(pixels).latent_dist
    decoded = model.decode(posterior.sample()).sample
    # L1 keeps strokes crisp, L2 gives the large errors of the first steps their weight.
    reconstruction = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
    return reconstruction + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].size


def _latent_std(model: AutoencoderKL, images: np.ndarray) -> float:
    """The standard deviation of all latent values: one number for the four channels."""
    batches = [encode_moments(model, images[start : start + 64]) for start in range(0, len(images), 64)]
    mean, log_variance = np.split(np.concatenate(batches), 2, axis=1)
    # The latents that are trained on are samples: the spread of the means, plus each posterior's own.
    return float(np.sqrt(mean.var() + np.exp(log_variance).mean()))
