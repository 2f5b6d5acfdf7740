"""Flags that the sampling commands share, in the spelling of facebookresearch/DiT and in MindONE's.

Needs no Paddle, so that what is wrong with the flags is said before the frameworks are imported.
"""

import argparse
import math
from pathlib import Path

from latent_diffusion.command_line import ArgumentParser, at_least, boolean
from latent_diffusion.errors import InputError
from latent_diffusion.guidance import check_interval
from latent_diffusion.sampling_arguments import add_device_arguments, add_guidance_arguments
from latent_diffusion.weights import WEIGHT_FOLDERS

from .configuration import MODEL_NAMES, DiTConfig

# The published weights.
PUBLISHED_MODEL, PUBLISHED_SIZES = "DiT-XL/2", (256, 512)
PUBLISHED_FILE = "DiT-XL-2-{size}x{size}.pt"
PUBLISHED_ADDRESS = "https://dl.fbaipublicfiles.com/DiT/models"


def add_network_arguments(parser: ArgumentParser, vae: str | None) -> None:
    """Adds the flags of network, VAE and device; `vae` is the command's default."""
    add = parser.add_argument
    parser.add_config()
    add(
        "--model",
        "--model-name",
        "--config-file",
        help="published name or config/*.json; without it, what the checkpoint holds",
    )
    add("--image-size", type=int, help="side of the images in pixels; without it the checkpoint's, or 256")
    add("--num-classes", type=int, help="number of classes; without it the checkpoint's")
    add(
        "--ckpt",
        "--dit-checkpoint",
        type=Path,
        help="weights: official .pt file, checkpoint or training folder, pipeline folder; without it the published "
        f"file of {PUBLISHED_MODEL} in {' or '.join(map(str, WEIGHT_FOLDERS))}",
    )
    parser.add_switch("--use-ema", default=True, help="take the averaged weights of a checkpoint that has both")
    add("--vae", "--vae-checkpoint", default=vae, help="mse, ema, a VAE folder or a name on the hub")
    add("--sd-scale-factor", type=float, help="scale of the latents; without it the VAE's own")
    add_device_arguments(parser)
    _add_choice(parser, "--use-fp16", "dtype", "fp16", "fp32")
    # In MindONE's files; neither changes what is sampled.
    parser.add_switch("--use-recompute", help="accepted for MindONE's files; sampling keeps no activations")
    add("--patch-embedder", choices=["conv", "linear"], help="accepted for MindONE's files; both are one function")


def add_sampling_arguments(parser: ArgumentParser, vae: str, cfg_scale: float) -> None:
    """Adds the flags of one way to sample, too; `vae` and `cfg_scale` are the command's defaults."""
    add_network_arguments(parser, vae)
    add_guidance_arguments(parser, cfg_scale)
    add = parser.add_argument
    add("--sampler", default="ddpm", help="ddpm, ddim or dpm-solver++")
    _add_choice(parser, "--ddim-sampling", "sampler", "ddim", "ddpm")
    add(
        "--num-sampling-steps",
        "--sampling-steps",
        type=at_least(1),
        default=250,
        help="how often the network is called",
    )


def _add_choice(parser: ArgumentParser, flag: str, dest: str, true: str, false: str) -> None:
    """Adds MindONE's form of another flag: `flag` alone or with True means `--dest true`, with False `--dest false`."""
    parser.add_argument(
        flag,
        dest=dest,
        type=lambda text: true if boolean(text) else false,
        nargs="?",
        metavar="BOOL",
        const="true",
        default=argparse.SUPPRESS,
        help=f"True for --{dest} {true}, False for --{dest} {false}",
    )


def check_sampling_arguments(arguments: argparse.Namespace) -> None:
    """Says before the frameworks are imported what can be known by then.

    Raises:
        InputError: weights, configuration or VAE are not there or not what they should be, or there is no such guidance
            interval.
    """
    check_interval(arguments.guidance_interval)
    check_network_arguments(arguments)


def check_network_arguments(arguments: argparse.Namespace) -> None:
    """As `check_sampling_arguments`, of the flags of `add_network_arguments`."""
    if arguments.sd_scale_factor is not None and not 0 < arguments.sd_scale_factor < math.inf:
        raise InputError(f"--sd-scale-factor must be positive and finite, not {arguments.sd_scale_factor}")
    config_file(arguments)
    find_checkpoint(arguments)
    check_vae(arguments.vae)


def find_checkpoint(arguments: argparse.Namespace) -> Path:
    """The weights that the flags mean.

    Raises:
        InputError: there are none; the message names where they were looked for and, for the published files, the
            command that gets them.
    """
    size = arguments.image_size or PUBLISHED_SIZES[0]
    if arguments.ckpt is None:
        named = arguments.model in (None, PUBLISHED_MODEL) and arguments.num_classes in (None, 1000)
        if not named or size not in PUBLISHED_SIZES:
            raise InputError(
                f"only {PUBLISHED_MODEL} at {' and '.join(map(str, PUBLISHED_SIZES))} pixels with 1000 classes is "
                "published; give the weights of another model with --ckpt"
            )
        candidates = [folder / PUBLISHED_FILE.format(size=size) for folder in WEIGHT_FOLDERS]
    else:
        candidates = [arguments.ckpt]
    if candidates[0].suffix == ".ckpt" and not candidates[0].is_dir():
        raise InputError(
            f"{candidates[0]} is a MindSpore file, which this suite does not read; give the PyTorch file it was made "
            f"from with --ckpt (--dit_checkpoint){_how_to_get(candidates[0].with_suffix('.pt'))}"
        )
    for path in candidates:
        if path.exists():
            return path
    raise InputError(
        f"found no weights at {' or '.join(map(str, candidates))}; name them with --ckpt{_how_to_get(candidates[0])}"
    )


def _how_to_get(path: Path) -> str:
    if path.name not in [PUBLISHED_FILE.format(size=size) for size in PUBLISHED_SIZES]:
        return ""
    return f", or get them with: curl -L --create-dirs -o {path} {PUBLISHED_ADDRESS}/{path.name}"


def config_file(arguments: argparse.Namespace) -> Path | None:
    """The configuration file that `--model` names, or None where it gives a published name or nothing.

    Raises:
        InputError: it is neither.
    """
    if arguments.model is None or arguments.model in MODEL_NAMES:
        return None
    path = Path(arguments.model)
    if not path.is_file():
        raise InputError(
            f"--model {arguments.model} is neither a configuration file nor one of {', '.join(MODEL_NAMES)}"
        )
    return path


def check_config(arguments: argparse.Namespace, config: DiTConfig, source: Path) -> None:
    """Compares what the flags say with the configuration of the weights in `source`.

    Raises:
        InputError: they contradict each other.
    """
    asked = {
        "--image-size": (arguments.image_size, config.resolution),
        "--num-classes": (arguments.num_classes, config.num_classes),
    }
    if arguments.model in MODEL_NAMES:
        asked["--model"] = (arguments.model, model_name(config))
    for flag, (wanted, found) in asked.items():
        if wanted not in (None, found):
            raise InputError(f"{flag} {wanted} contradicts {source}, which is of {found}")


def model_name(config: DiTConfig) -> str:
    """The published name of a network of this width, depth and patch size, or a description of it."""
    shape = _shape(config)
    for name in MODEL_NAMES:
        if _shape(DiTConfig.from_name(name)) == shape:
            return name
    return f"DiT-{config.num_layers}x{config.hidden_size}/{config.patch_size}"


def _shape(config: DiTConfig) -> tuple[int, ...]:
    return config.num_layers, config.num_attention_heads, config.attention_head_dim, config.patch_size


def check_vae(name: str) -> None:
    """Raises `InputError` for a file of MindSpore, which MindONE's files name."""
    if name.endswith(".ckpt"):
        raise InputError(
            f"{name} is a MindSpore file, which this suite does not read; give --vae (--vae_checkpoint) mse, ema, "
            "or the folder of a VAE"
        )
