"""Images to latents in the fastdit layout; an interrupted extraction continues where it stopped."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from latent_diffusion.errors import InputError
from latent_diffusion.files import replace_file
from latent_diffusion.images import list_image_folder, read_image
from latent_diffusion.vae import encode_moments

from .features import feature_folders


@dataclass(frozen=True)
class ExtractionSettings:
    """What the extracted features depend on; kept in the manifest beside them.

    Attributes:
        vae: name or path of the VAE, as given.
        scaling_factor: what its latents were multiplied by.
        resolution: side of the images in pixels.
        dtype: "float16" or "float32".
        flip: whether mirrored latents are written too.
        seed: of the posterior samples.
        images, classes: what the image folder holds.
    """

    vae: str
    scaling_factor: float
    resolution: int
    dtype: str
    flip: bool
    seed: int
    images: int
    classes: list[str]


def extract_features(
    features_path: Path,
    vae,
    settings: ExtractionSettings,
    paths: list[Path],
    labels: list[int],
    batch_size: int,
) -> int:
    """Writes one sample of the VAE's posterior, scaled, and the label of every image.

    The noise of image i depends on (seed, i) alone and batches always hold the same images, so that a restarted
    extraction gives the same files. Names count the images in the order of their sorted paths.

    Args:
        features_path: where the folders of the layout are made.
        vae: an `AutoencoderKL` in eval mode.
        paths, labels: the images and their classes.
        batch_size: images encoded at a time.

    Returns:
        How many images were encoded now; the others were there already.

    Raises:
        InputError: an image is unreadable, or the folder holds features made with other settings.
    """
    _claim(features_path / f"imagenet{settings.resolution}_manifest.json", settings)
    folders = feature_folders(features_path, settings.resolution)
    latents, label_folder, flipped = folders
    for folder in folders if settings.flip else folders[:2]:
        folder.mkdir(parents=True, exist_ok=True)
    done = _existing(label_folder)
    encoded = 0
    with tqdm(total=len(paths), unit="image", desc="extract", mininterval=1) as progress:
        for start in range(0, len(paths), batch_size):
            batch = range(start, min(start + batch_size, len(paths)))
            if not all(i in done for i in batch):
                images = np.stack([read_image(paths[i], settings.resolution) for i in batch])
                _write(latents, batch, _posterior_sample(vae, images, batch, settings), settings)
                if settings.flip:
                    _write(flipped, batch, _posterior_sample(vae, images[:, :, ::-1], batch, settings), settings)
                for i in batch:
                    # The label comes last: an image is done when its label is there.
                    _save(label_folder / f"{i}.npy", np.array([labels[i]], dtype=np.int64))
                encoded += len(batch)
            progress.update(len(batch))
    return encoded


def prepare(data_path: Path, vae_name: str, vae, resolution: int, dtype: str, flip: bool, seed: int):
    """Lists the images and states the settings: (settings, paths, labels) for `extract_features`.

    Raises:
        InputError: the image folder is missing or holds no images, or the VAE does not fit the layout.
    """
    paths, labels, classes = list_image_folder(data_path)
    settings = ExtractionSettings(
        vae=vae_name,
        scaling_factor=float(vae.config.scaling_factor),
        resolution=resolution,
        dtype=dtype,
        flip=flip,
        seed=seed,
        images=len(paths),
        classes=classes,
    )
    return settings, paths, labels


def _claim(manifest: Path, settings: ExtractionSettings) -> None:
    """Writes the manifest, or checks that an earlier run with the same settings wrote it."""
    values = dataclasses.asdict(settings)
    if not manifest.exists():
        manifest.parent.mkdir(parents=True, exist_ok=True)
        replace_file(manifest, lambda path: path.write_text(json.dumps(values, indent=2) + "\n"))
        return
    try:
        earlier = json.loads(manifest.read_text())
    except ValueError:
        raise InputError(f"{manifest} is damaged; remove it and its feature folders to extract anew") from None
    different = [name for name in values if earlier.get(name) != values[name]]
    if different:
        name = different[0]
        raise InputError(
            f"{manifest} says the features there were made with {name} {earlier.get(name)!r}, not {values[name]!r}; "
            "choose another --features-path or remove them"
        )


def _existing(label_folder: Path) -> set[int]:
    return {int(path.stem) for path in label_folder.glob("*.npy") if path.stem.isdigit()}


def _posterior_sample(vae, images: np.ndarray, batch: range, settings: ExtractionSettings) -> np.ndarray:
    mean, std = encode_moments(vae, images)
    noise = [np.random.default_rng([settings.seed, i]).standard_normal(mean.shape[1:], dtype=np.float32) for i in batch]
    return (mean + std * np.stack(noise)) * settings.scaling_factor


def _write(folder: Path, batch: range, latents: np.ndarray, settings: ExtractionSettings) -> None:
    for i, latent in zip(batch, latents, strict=True):
        _save(folder / f"{i}.npy", latent[None].astype(settings.dtype))


def _save(path: Path, array: np.ndarray) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array)

    replace_file(path, write)
