"""A small AutoencoderKL for the digits: 64x64 pixels to latents of 4x8x8, trained in about a minute on 2 cores."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from ppdiffusers import AutoencoderKL

from latent_diffusion.errors import InputError
from latent_diffusion.files import new_folder
from latent_diffusion.vae import encode_moments, to_pixels

from .digits import IMAGE_SIZE
from .fit import fit

# Paddle's convolutions work image by image on a CPU: a larger batch sees no more images per second.
BATCH_SIZE = 8
SEED = 0


@dataclass(frozen=True)
class Stage:
    """Part of training: its steps, and the side of the squares that are cut out of images for it."""

    steps: int
    peak_learning_rate: float
    side: int = IMAGE_SIZE


@dataclass(frozen=True)
class Recipe:
    """How an autoencoder is built and trained.

    Attributes:
        stages: one after the other.
        l1_weight: of the absolute error of pixels, beside their squared error.
        kl_weight: of the KL term, which is averaged over the latent values, the errors over the pixels.
        decoder_widths: channels of its blocks, that at full resolution first.
        norm_num_groups: of all normalizations.
        passes_on: whether layers pass on what they take from the first step on, see `_pass_on`.
    """

    stages: tuple[Stage, ...]
    l1_weight: float
    kl_weight: float
    decoder_widths: tuple[int, ...]
    norm_num_groups: int
    passes_on: bool


# L1 keeps strokes crisp, L2 gives the large errors of the first steps their weight. With a KL weight of 1e-3 the
# channels' deviations run from 0.5 to 2.0; with 1e-2 from 0.6 to 1.4, around mean 0, and digits read as well as before.
WHITE = Recipe(
    (Stage(400, 4e-3),),
    l1_weight=1.0,
    kl_weight=1e-2,
    decoder_widths=(4, 4, 8, 16),
    norm_num_groups=4,
    passes_on=False,
)
# In a minute training learns what is dark and bright and mostly one difference of colors, blue from yellow or red from
# cyan: without passing on, or with L1 and the narrow decoder, red, green, blue and yellow did not stay apart.
# Normalizing channels one by one removes colors. Most steps see a quarter of an image, in about that part of the time.
COLORED = Recipe(
    (Stage(1000, 8e-3, side=32), Stage(150, 4e-3)),
    l1_weight=0.0,
    kl_weight=2.5e-4,
    decoder_widths=(8, 8, 8, 16),
    norm_num_groups=1,
    passes_on=True,
)


def train_autoencoder(images: np.ndarray, output_dir: Path, recipe: Recipe = WHITE) -> AutoencoderKL:
    """Trains an autoencoder, saves it in `output_dir` and returns it in eval mode.

    Args:
        images: uint8 `[N, 64, 64, 3]`, the training images.
        output_dir: a folder for `AutoencoderKL.from_pretrained`; it appears once whole, in place of an older one.
        recipe: `WHITE` or `COLORED`, as the images are.

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
    model = build_autoencoder(recipe)
    for stage in recipe.stages:
        _fit(model, images, stage, recipe)
    model.eval()
    model.register_to_config(scaling_factor=1 / _latent_std(model, images))
    with new_folder(Path(output_dir), marker="config.json") as folder:
        model.save_pretrained(str(folder), safe_serialization=False)
    return model


def build_autoencoder(recipe: Recipe = WHITE) -> AutoencoderKL:
    """A fresh autoencoder with 41,000 or 43,000 weights: images `[N, 3, 64, 64]` in -1..1 to latents `[N, 4, 8, 8]`."""
    model = AutoencoderKL(
        # Four blocks downsample by 8, the factor that ppdiffusers' latent diffusion pipelines assume.
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        # Time goes into convolutions at full resolution, and the digits hold 8x8 pixels' worth of detail: so few
        # channels there, and an encoder whose blocks only downsample (no residual layers, hence one width).
        layers_per_block=0,
        down_block_out_channels=(16, 16, 16, 16),
        up_block_out_channels=recipe.decoder_widths,
        norm_num_groups=recipe.norm_num_groups,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
    )
    if recipe.passes_on:
        _pass_on(model)
    return model


@paddle.no_grad()
def _pass_on(model: AutoencoderKL) -> None:
    """Adds the identity to convolutions, but for those of residual branches: latents hold colors from the start."""
    for name, layer in model.named_sublayers():
        if isinstance(layer, paddle.nn.Conv2D) and not name.endswith(("conv1", "conv2")):
            identity = paddle.zeros_like(layer.weight)
            paddle.nn.initializer.Dirac()(identity)
            layer.weight.set_value(0.3 * layer.weight + identity)


def _fit(model: AutoencoderKL, images: np.ndarray, stage: Stage, recipe: Recipe) -> None:
    batches = _batches(images, stage.side)
    fit(
        model,
        lambda: _loss(model, next(batches), recipe),
        stage.steps,
        stage.peak_learning_rate,
        rising=0.15,
        description="autoencoder",
    )


def _batches(images: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """Endless shuffled batches, a square of that side at random of each; an epoch's incomplete last batch is kept."""
    generator = np.random.default_rng(SEED)
    while True:
        order = generator.permutation(len(images))
        for start in range(0, len(order), BATCH_SIZE):
            batch = images[order[start : start + BATCH_SIZE]]
            top, left = generator.integers(IMAGE_SIZE - side + 1, size=2) if side < IMAGE_SIZE else (0, 0)
            yield batch[:, top : top + side, left : left + side]


def _loss(model: AutoencoderKL, images: np.ndarray, recipe: Recipe) -> paddle.Tensor:
    pixels = to_pixels(images)
    posterior = model.encode(pixels).latent_dist
    decoded = model.decode(posterior.sample()).sample
    reconstruction = recipe.l1_weight * F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
    return reconstruction + recipe.kl_weight * posterior.kl().mean() / posterior.mean[0].size


def encode_all(model: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Moments of any number of images, as `encode_moments` gives them."""
    return np.concatenate([encode_moments(model, images[start : start + 64]) for start in range(0, len(images), 64)])


def _latent_std(model: AutoencoderKL, images: np.ndarray) -> float:
    """The standard deviation of all latent values: one number for the four channels."""
    mean, log_variance = np.split(encode_all(model, images), 2, axis=1)
    # The latents that are trained on are samples: the spread of the means, plus each posterior's own.
    return float(np.sqrt(mean.var() + np.exp(log_variance).mean()))
