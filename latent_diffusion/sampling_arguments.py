"""Flags that the sampling commands of all systems share. Needs no Paddle."""

import argparse
import os
import sys
from pathlib import Path

from .command_line import MOST_SAMPLES, ArgumentParser, at_least
from .guidance import ALL_STEPS

AMP_DTYPES = {"fp32": None, "fp16": "float16", "bf16": "bfloat16"}


def add_device_arguments(parser: ArgumentParser) -> None:
    """Adds the flags of the device and of what the network does on it."""
    add = parser.add_argument
    add(
        "--device", "--device-target", type=str.lower, choices=["cpu", "gpu"], help="without it the GPU if there is one"
    )
    add("--dtype", choices=list(AMP_DTYPES), default="fp32", help="precision of matrix products; a CPU has no fp16")
    parser.add_switch("--enable-flash-attention", help="use Paddle's flash / memory-efficient attention on a GPU")


def amp_dtype(device: str, dtype: str) -> str | None:
    """What `--dtype` means for the matrix products of a network on `device`: "float16", "bfloat16", None for float32.

    That `device` does not have it is said.
    """
    from . import precision

    chosen, note = precision.choose(AMP_DTYPES[dtype], device)
    if note:
        print(f"note: {note}", file=sys.stderr)
    return chosen


def add_guidance_arguments(parser: ArgumentParser, cfg_scale: float) -> None:
    """Adds the flags of classifier-free guidance; `cfg_scale` is the command's default."""
    add = parser.add_argument
    add(
        "--cfg-scale", "--guidance-scale", type=at_least(1, float), default=cfg_scale, help="guidance scale, 1 for none"
    )
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=ALL_STEPS,
        help="guide at these timesteps only, as shares of the training's: 0 is the image, 1 the noise",
    )


def add_many_samples_arguments(parser: ArgumentParser) -> None:
    """Adds the flags of sampling many images into a folder, without that of their number."""
    add = parser.add_argument
    add("--sample-dir", type=Path, default=Path("samples"), help="where the folder of this run is made")
    add(
        "--per-proc-batch-size",
        type=at_least(1, at_most=MOST_SAMPLES),
        default=32,
        help="images that a process samples at a time",
    )
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="let a GPU multiply in TF32")


def set_tf32(allowed: bool) -> None:
    """Lets a GPU multiply in TF32 or not; before Paddle is imported, since NVIDIA's libraries read it when loaded."""
    if not allowed:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def samples_name(model: str, resolution: int, vae: str, arguments: argparse.Namespace) -> str:
    """The name of a folder of samples: as the script of facebookresearch/DiT makes it, and the guidance interval.

    Args:
        model: the network and its weights.
        resolution: side of the images in pixels.
        vae: name or path of the VAE.
        arguments: `--cfg-scale`, `--guidance-interval`, which is named where there is one, and `--global-seed`.
    """
    interval = tuple(arguments.guidance_interval)
    guidance = f"cfg-{arguments.cfg_scale}" + ("" if interval == ALL_STEPS else "-interval-{:g}-{:g}".format(*interval))
    return f"{model}-size-{resolution}-vae-{Path(vae).absolute().name}-{guidance}-seed-{arguments.global_seed}"
