"""The frozen autoencoder between pixels and latents (ppdiffusers' `AutoencoderKL`)."""

import itertools
import re
import sys
from pathlib import Path

import numpy as np
import paddle

from .checkpoint import set_weights
from .configuration import VAE_DOWNSAMPLING
from .errors import InputError, NotFiniteError
from .hub import existing_file, local_folder, read_json
from .pretrained import PADDLE_FILES, TORCH_FILES, check_size, checksum, describing
from .weights import WEIGHT_SUFFIXES, read_weights, transpose_linear

_FILES = PADDLE_FILES + TORCH_FILES

# The attention layers before version 0.12 of diffusers, whose names published files still have.
_FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Names in the layout of CompVis (ldm/modules/diffusionmodules/model.py of CompVis/stable-diffusion) and diffusers' own.
# Blocks are numbered from 1 in the middle; the decoder's are counted from the last.
_COMPVIS_NAMES = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
# Of that code, whose files do not say it.
_COMPVIS_GROUPS, _COMPVIS_SCALE = 32, 0.18215

# Where the log variances of a posterior end (`DiagonalGaussianDistribution` of CompVis/stable-diffusion).
_LOG_VARIANCES = -30.0, 20.0

# What facebookresearch/DiT calls them.
_SHORT_NAMES = ("mse", "ema")


def full_name(name_or_path: str) -> str:
    """A VAE's name on the hub, for "mse" and "ema" of the official command lines; other names without a last slash."""
    return f"stabilityai/sd-vae-ft-{name_or_path}" if name_or_path in _SHORT_NAMES else name_or_path.rstrip("/")


def load_vae(name_or_path: str):
    """Loads a VAE of ppdiffusers, diffusers (PyTorch) or CompVis.

    Args:
        name_or_path: a folder of ppdiffusers or diffusers, its name (or short name) on the hub, or a file of weights in
            the layout of CompVis, as `autoencoder_kl.pth` of U-ViT. A `config.json` of diffusers beside such a file
            says its `norm_num_groups` and `scaling_factor`; without one they are Stable Diffusion's.

    Returns:
        An `AutoencoderKL` in eval mode; `config.scaling_factor` scales its latents to about unit variance.

    Raises:
        InputError: there is no such folder or file, it is bad, or the hub cannot be reached.
    """
    path = Path(name_or_path)
    if path.suffix in WEIGHT_SUFFIXES and not path.is_dir():
        vae = _from_compvis(path)
    else:
        vae = _from_folder(local_folder(full_name(name_or_path), ("config.json", _FILES), "VAE"))
    vae.eval()
    return vae


def load_fitting_vae(name_or_path: str, channels: int):
    """`load_vae` for a model whose latents have that many channels, and 1 / `VAE_DOWNSAMPLING` of the image's side.

    Raises:
        InputError: see `load_vae`, or the latents of the VAE are others.
    """
    vae = load_vae(name_or_path)
    check_fits(vae, name_or_path, channels)
    return vae


def vae_settings(vae) -> dict[str, str | float]:
    """What decoded images are a function of beside latents, as plain values; weights by their checksum."""
    return {"vae": checksum(vae), "scaling_factor": vae.config.scaling_factor}


def load_vae_for_images(name_or_path: str, latent_shape: tuple[int, int, int]):
    """A VAE to look at samples with, or None, with one warning, where it cannot be used.

    It decodes one latent of `latent_shape` (C, H, W): a VAE that does not fit says so before training, not after the
    first thousand steps of it.
    """
    try:
        vae = load_vae(name_or_path)
        check_channels(vae, name_or_path, latent_shape[0])
        decode_latents(vae, paddle.zeros([1, *latent_shape]))
    except Exception as error:  # whatever is wrong with it, training can do without
        print(f"warning: no images will be logged: {error}", file=sys.stderr)
        return None
    return vae


def check_fits(vae, name: str, channels: int) -> None:
    """Raises `InputError` unless the VAE called `name` makes such latents as `load_fitting_vae` says."""
    check_channels(vae, name, channels)
    check_downsampling(vae, name, VAE_DOWNSAMPLING)


def check_channels(vae, name: str, channels: int) -> None:
    """Raises `InputError` unless the latents of the VAE called `name` have as many channels as the model's."""
    if vae.config.latent_channels != channels:
        raise InputError(f"the VAE {name} has {vae.config.latent_channels} latent channels, the model {channels}")


def check_downsampling(vae, name: str, factor: int) -> None:
    """Raises `InputError` unless the VAE called `name` makes latents of 1 / `factor` of the image's side."""
    if (found := 2 ** (len(vae.config.block_out_channels) - 1)) != factor:
        raise InputError(f"the VAE {name} makes latents of 1/{found} of the image's side; the model takes 1/{factor}")


def _from_folder(folder: Path):
    source = existing_file(folder, ("config.json",), "VAE")
    file = existing_file(folder, _FILES, "VAE")
    config = read_json(source)
    # Newer diffusers writes it; ppdiffusers knows no VAE without that attention, whose weights would be missing.
    config.pop("mid_block_add_attention", None)
    weights = read_weights(file)
    vae = _build(config, source, weights)
    set_weights(vae, _from_torch(weights) if file.name in TORCH_FILES else weights, file)
    return vae


def _build(config: dict, source: Path, weights: dict[str, np.ndarray]):
    """A VAE to be given the weights; `source` names the configuration in errors."""
    from ppdiffusers.models.autoencoder_kl import AutoencoderKL

    with describing(source, "an AutoencoderKL"):
        check_size(weights, *_least_size(config))
        return AutoencoderKL.from_config(config)


def _least_size(config: dict) -> tuple[float, int]:
    """How many numbers and layers such a VAE has at least: two convolutions a layer and block, in either half."""
    channels, layers = config.get("block_out_channels", ()), abs(config.get("layers_per_block", 1))
    numbers = 2 * layers * sum(2 * 9 * count**2 for count in channels)
    ends = sum(abs(config.get(key, 0)) for key in ("in_channels", "out_channels", "latent_channels"))
    return numbers + ends, 2 * layers * len(channels)


def _from_compvis(file: Path):
    weights = read_weights(file)
    beside = file.with_name("config.json")
    given = read_json(beside) if beside.is_file() else {}
    vae = _build(_compvis_config(weights, given, file), beside if given else file, weights)
    blocks = len(vae.config.block_out_channels)
    renamed = {_diffusers_name(name, blocks): _without_kernel(name, value) for name, value in weights.items()}
    set_weights(vae, _from_torch(renamed), file)
    return vae


def _compvis_config(weights: dict[str, np.ndarray], given: dict, file: Path) -> dict:
    """Arguments of `AutoencoderKL`, from the shapes of the weights; `given` says what shapes do not."""
    shapes = {name: value.shape for name, value in weights.items() if value.ndim == 4}
    names = (f"encoder.down.{i}.block.0.conv2.weight" for i in itertools.count())
    channels = [shapes[name][0] for name in itertools.takewhile(shapes.__contains__, names)]
    layers = [name for name in shapes if re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv2\.weight", name)]
    if not channels or "post_quant_conv.weight" not in shapes:
        raise InputError(f"{file} is no VAE in the layout of CompVis; of one in another layout give the folder")
    groups = given.get("norm_num_groups", _COMPVIS_GROUPS)
    if not isinstance(groups, int) or groups < 1 or any(count % groups for count in channels):
        raise InputError(
            f"the shapes in {file} leave its norm_num_groups open, and {groups} does not divide its block channels "
            f"{channels}; put the config.json of the VAE beside it"
        )
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": len(layers),
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "norm_num_groups": groups,
        "scaling_factor": given.get("scaling_factor", _COMPVIS_SCALE),
    }


def _diffusers_name(name: str, blocks: int) -> str:
    """The name that diffusers has for what CompVis calls `name`, in a VAE of that many blocks."""
    for pattern, replacement in _COMPVIS_NAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{blocks - 1 - int(match[1])}.", name)


def _without_kernel(name: str, value: np.ndarray) -> np.ndarray:
    """The attention layers are Linear in diffusers and convolutions of one pixel in CompVis."""
    return value[:, :, 0, 0] if ".attn_1." in name and value.shape[2:] == (1, 1) else value


def _from_torch(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of diffusers' `AutoencoderKL`, old or new, as ppdiffusers' has them: the attention layers are Linear."""
    return {_current_name(name): value for name, value in transpose_linear(weights).items()}


def _current_name(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    block, _, last = layer.rpartition(".")
    return f"{block}.{_FORMER_NAMES[last]}.{kind}" if last in _FORMER_NAMES else name


def to_pixels(images: np.ndarray | paddle.Tensor) -> paddle.Tensor:
    """Images uint8 [B, H, W, 3] as a VAE takes them: float32 [B, 3, H, W] in [-1, 1]."""
    images = paddle.to_tensor(images) if isinstance(images, np.ndarray) else images
    return images.transpose([0, 3, 1, 2]).astype("float32") / 127.5 - 1.0


@paddle.no_grad()
def encode_moments(vae, images: np.ndarray) -> np.ndarray:
    """Posterior of the latents, before scaling.

    Args:
        vae: an `AutoencoderKL`.
        images: uint8 [B, H, W, 3].

    Returns:
        Moments float32 [B, 2 C, H / f, W / f] for a VAE that downsamples by f: C channels of means, C of log variances
        in [-30, 20].
    """
    posterior = vae.encode(to_pixels(images).astype(vae.dtype)).latent_dist
    return paddle.concat([posterior.mean, posterior.logvar], axis=1).astype("float32").numpy()


@paddle.no_grad()
def encode_latents(vae, images: paddle.Tensor, noise: paddle.Tensor) -> paddle.Tensor:
    """A scaled sample of the posterior of each image, as training takes it: float32 [B, C, H / f, W / f].

    Args:
        vae: an `AutoencoderKL`.
        images: uint8 [B, H, W, 3].
        noise: standard normal, float32 [B, C, H / f, W / f].
    """
    posterior = vae.encode(to_pixels(images).astype(vae.dtype)).latent_dist
    return (posterior.mean + posterior.std * noise).astype("float32") * vae.config.scaling_factor


def sample_moments(moments: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """A sample of the posterior, before scaling.

    Args:
        moments: float [..., 2 C, H, W] from `encode_moments`; in files of other programs log variances may go beyond
            [-30, 20], where they are cut off.
        noise: standard normal, float32 [..., C, H, W].
    """
    mean, log_variance = np.split(moments.astype(np.float32), 2, axis=-3)
    return mean + np.exp(0.5 * log_variance.clip(*_LOG_VARIANCES)) * noise


@paddle.no_grad()
def decode_latents(vae, latents: paddle.Tensor, batch_size: int = 16) -> np.ndarray:
    """Decodes scaled latents [B, C, h, w] to images, uint8 [B, H, W, 3], `batch_size` at a time.

    Raises:
        NotFiniteError: values that are not finite come out, which would pass for colors.
    """
    images = []
    for start in range(0, latents.shape[0], batch_size):
        part = latents[start : start + batch_size].astype(vae.dtype) / vae.config.scaling_factor
        decoded = vae.decode(part).sample.astype("float32")
        if not paddle.isfinite(decoded).all():
            raise NotFiniteError(
                "the samples are not finite: the weights are damaged, or half precision is too coarse for them; try "
                "other weights, or --dtype fp32"
            )
        pixels = (decoded / 2 + 0.5).clip(0, 1)
        images.append((pixels.transpose([0, 2, 3, 1]).numpy() * 255).round().astype("uint8"))
    return np.concatenate(images)
