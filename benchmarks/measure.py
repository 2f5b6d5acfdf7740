"""Runs the real commands and reads the figures they print."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from latent_diffusion.errors import InputError

# Of the blocks of `stabilityai/sd-vae-ft-mse`.
STABLE_DIFFUSION_CHANNELS = (128, 256, 512, 512)


def printed(command: Sequence[object], folder: Path, environment: dict[str, str] | None = None) -> str:
    """What a command prints.

    Args:
        command: what follows `python`.
        folder: where it runs.
        environment: of the process; None for this one's.

    Raises:
        InputError: it fails; its last line says why.
    """
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise InputError(f"{' '.join(map(str, command))} ended with exit status {done.returncode}: {''.join(reason)}")
    return done.stdout


def last_figures(
    command: Sequence[object], folder: Path, environment: dict[str, str] | None = None
) -> dict[str, float]:
    """What a training command logs last: the means since the log line before it. Arguments and errors: `printed`."""
    lines = [line for line in printed(command, folder, environment).splitlines() if re.match(r"step \d+/\d+: ", line)]
    return {name: float(value) for name, value in re.findall(r"(\w+) ([-\d.e+]+)(?:,|$)", lines[-1].split(": ", 1)[1])}


def scratch() -> tempfile.TemporaryDirectory:
    """A folder for data that is made for a measurement and removed after it."""
    return tempfile.TemporaryDirectory(prefix="benchmark-")


def write_features(folder: Path, image_size: int, count: int) -> Path:
    """Random latents and labels in the fastdit layout: their values do not change the time."""
    rng = np.random.default_rng(0)
    side = image_size // 8
    for kind in ("features", "labels"):
        (folder / f"imagenet{image_size}_{kind}").mkdir(parents=True)
    for i in range(count):
        latents = rng.standard_normal((1, 4, side, side), dtype=np.float32)
        np.save(folder / f"imagenet{image_size}_features/{i}.npy", latents)
        np.save(folder / f"imagenet{image_size}_labels/{i}.npy", np.array([i % 10]))
    return folder


def feature_contents(image_size: int, count: int) -> dict:
    """What extraction writes in each layout, mirrored images included."""
    from latent_diffusion.records import LATENTS, MOMENTS, ImageContents

    side = image_size // 8
    return {
        "files": ImageContents(LATENTS, (2, 4, side, side), "float32", count, image_size, 0.18215),
        "packed": ImageContents(MOMENTS, (2, 8, side, side), "float16", count, image_size, 0.18215),
    }


def write_random(writer) -> None:
    """Lets a `RecordWriter` write random records, with labels from 0 to 9: their values do not change the time."""
    writer.claim()
    rng = np.random.default_rng(0)
    for start in range(0, writer.contents.records, 256):
        numbers = range(start, min(start + 256, writer.contents.records))
        values = rng.standard_normal((len(numbers), *writer.contents.record_shape), dtype=np.float32)
        writer.write(numbers, values, [number % 10 for number in numbers])
    writer.finish([])


def write_images(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> Path:
    """JPEG files of random blots in two classes; by default of the usual size of ImageNet's."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        blots = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        blots.save(folder / "ab"[i % 2] / f"{i}.jpg", quality=90)
    return folder


def random_vae(channels: Sequence[int]):
    """An `AutoencoderKL` in the shape of Stable Diffusion's with these channels of its blocks, in eval mode.

    Its weights are random: they do not change the time.
    """
    from ppdiffusers.models.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=list(channels),
        layers_per_block=2,
        norm_num_groups=min(32, channels[0]),
        latent_channels=4,
    )
    vae.eval()
    return vae
