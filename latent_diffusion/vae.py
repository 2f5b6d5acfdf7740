"""The frozen autoencoder between pixels and latents (ppdiffusers' `AutoencoderKL`)."""

import json
import sys
from pathlib import Path

import numpy as np
import paddle

from .checkpoint import set_weights
from .errors import InputError
from .weights import read_weights, transpose_linear

# File names a VAE folder may hold its weights under, ppdiffusers' own first.
_PADDLE_FILES = ("model_state.pdparams", "diffusion_paddle_model.safetensors")
_TORCH_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# The attention layers before version 0.12 of diffusers, whose names published files still have.
_FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# What facebookresearch/DiT calls them.
_SHORT_NAMES = ("mse", "ema")


def full_name(name_or_path: str) -> str:
    """A VAE's name on the hub, for "mse" and "ema" of the official command lines; other names without a last slash."""
    return f"stabilityai/sd-vae-ft-{name_or_path}" if name_or_path in _SHORT_NAMES else name_or_path.rstrip("/")


def load_vae(name_or_path: str):
    """Loads a VAE from a folder of ppdiffusers or diffusers (PyTorch), or by its name (or short name) on the model hub.

    Returns:
        An `AutoencoderKL` in eval mode; `config.scaling_factor` scales its latents to about unit variance.

    Raises:
        InputError: there is no such folder, its files are bad, or the hub cannot be reached.
    """
    from ppdiffusers.models.autoencoder_kl import AutoencoderKL

    folder = Path(name_or_path)
    if folder.is_dir():
        vae = _from_folder(AutoencoderKL, folder)
    else:
        try:
            vae = AutoencoderKL.from_pretrained(full_name(name_or_path))
        except Exception as error:  # the hub clients raise whatever their transport raises
            raise InputError(
                f"the VAE {name_or_path!r} is neither a folder nor could it be downloaded "
                f"({type(error).__name__}); give the path of a downloaded VAE folder"
            ) from error
    vae.eval()
    return vae


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


def check_channels(vae, name: str, channels: int) -> None:
    """Raises `InputError` unless the latents of the VAE called `name` have as many channels as the model's."""
    if vae.config.latent_channels != channels:
        raise InputError(f"the VAE {name} has {vae.config.latent_channels} latent channels, the model {channels}")


def check_downsampling(vae, name: str, factor: int) -> None:
    """Raises `InputError` unless the VAE called `name` makes latents of 1 / `factor` of the image's side."""
    if (found := 2 ** (len(vae.config.block_out_channels) - 1)) != factor:
        raise InputError(f"the VAE {name} makes latents of 1/{found} of the image's side; DiT takes 1/{factor}")


def _from_folder(cls, folder: Path):
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise InputError(f"the VAE folder {folder} has no readable config.json: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'} is not JSON: {error}") from None
    names = _PADDLE_FILES + _TORCH_FILES
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"the VAE folder {folder} holds none of {', '.join(names)}")
    try:
        # Newer diffusers writes it; ppdiffusers knows no VAE without that attention, whose weights would be missing.
        config.pop("mid_block_add_attention", None)
        vae = cls.from_config(config)
    except Exception as error:  # a wrong value can make its layers raise anything
        raise InputError(f"{folder / 'config.json'} does not describe an AutoencoderKL: {error}") from error
    weights = read_weights(file)
    set_weights(vae, _from_torch(weights) if file.name in _TORCH_FILES else weights, file)
    return vae


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
        moments: float [..., 2 C, H, W] from `encode_moments`.
        noise: standard normal, float32 [..., C, H, W].
    """
    mean, log_variance = np.split(moments.astype(np.float32), 2, axis=-3)
    return mean + np.exp(0.5 * log_variance) * noise


@paddle.no_grad()
def decode_latents(vae, latents: paddle.Tensor, batch_size: int = 16) -> np.ndarray:
    """Decodes scaled latents [B, C, h, w] to images, uint8 [B, H, W, 3], `batch_size` at a time.

    Raises:
        InputError: values that are not finite come out, which would pass for colors.
    """
    images = []
    for start in range(0, latents.shape[0], batch_size):
        part = latents[start : start + batch_size].astype(vae.dtype) / vae.config.scaling_factor
        decoded = vae.decode(part).sample.astype("float32")
        if not paddle.isfinite(decoded).all():
            raise InputError(
                "the samples are not finite: the weights are damaged, or half precision is too coarse for them; try "
                "other weights, or --dtype fp32"
            )
        pixels = (decoded / 2 + 0.5).clip(0, 1)
        images.append((pixels.transpose([0, 2, 3, 1]).numpy() * 255).round().astype("uint8"))
    return np.concatenate(images)
