"""Images to latents in the fastdit layout; an interrupted extraction continues where it stopped."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latent_diffusion.errors import InputError
from latent_diffusion.files import replace_file
from latent_diffusion.images import list_image_folder, read_image
from latent_diffusion.progress import progress
from latent_diffusion.vae import encode_moments, sample_moments

from .configuration import VAE_DOWNSAMPLING
from .features import feature_folders


@dataclass(frozen=True)
class ExtractionSettings:
    """How features are made; all of it goes into the manifest beside them.

    Attributes:
        vae: name or path of the VAE.
        resolution: side of the images in pixels.
        dtype: "float16" or "float32".
        flip: whether mirrored latents are written too.
        seed: of the posterior samples.
    """

    vae: str
    resolution: int
    dtype: str = "float32"
    flip: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.resolution < 1 or self.resolution % VAE_DOWNSAMPLING:
            raise InputError(f"the image size {self.resolution} is not a positive multiple of {VAE_DOWNSAMPLING}")
        if self.seed < 0:
            raise InputError(f"the seed must be at least 0, not {self.seed}")


def extract_features(
    data_path: Path, features_path: Path, settings: ExtractionSettings, vae, batch_size: int = 16
) -> tuple[int, int]:
    """Writes one sample of the VAE's posterior, scaled, and the label of every image of an image folder.

    The noise of image i depends on (seed, i) alone, and batches of one size always hold the same images, so that a
    restarted extraction gives the same files. Names count the images in the order of their sorted paths.

    Args:
        data_path: one folder a class.
        features_path: where the folders of the layout are made.
        vae: the `AutoencoderKL` that the settings name, in eval mode.
        batch_size: images encoded at a time.

    Returns:
        How many images were encoded now, and how many there are; the others were there already.

    Raises:
        InputError: an image is unreadable, or the folder holds features made with other settings.
    """
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, not {batch_size}")
    paths, labels, classes = list_image_folder(data_path)
    source = {"scaling_factor": float(vae.config.scaling_factor), "images": len(paths), "classes": classes}
    _claim(features_path / f"imagenet{settings.resolution}_manifest.json", dataclasses.asdict(settings) | source)
    folders = feature_folders(features_path, settings.resolution)
    latents, label_folder, flipped = folders
    for folder in folders if settings.flip else folders[:2]:
        folder.mkdir(parents=True, exist_ok=True)
    done = _existing(label_folder)
    encoded = 0
    with progress(total=len(paths), desc="extract", unit="image") as bar:
        for start in range(0, len(paths), batch_size):
            batch = range(start, min(start + batch_size, len(paths)))
            if not all(i in done for i in batch):
                images = np.stack([read_image(paths[i], settings.resolution) for i in batch])
                _write(latents, batch, _posterior_sample(vae, images, batch, settings.seed), settings.dtype)
                if settings.flip:
                    mirrored = _posterior_sample(vae, images[:, :, ::-1], batch, settings.seed)
                    _write(flipped, batch, mirrored, settings.dtype)
                for i in batch:
                    # The label comes last: an image is done when its label is there.
                    _save(label_folder / f"{i}.npy", np.array([labels[i]], dtype=np.int64))
                encoded += len(batch)
            bar.update(len(batch))
    return encoded, len(paths)


def _claim(manifest: Path, values: dict) -> None:
    """Writes the manifest, or checks that an earlier run with the same values wrote it."""
    if not manifest.exists():
        manifest.parent.mkdir(parents=True, exist_ok=True)
        replace_file(manifest, lambda path: path.write_text(json.dumps(values, indent=2) + "\n"))
        return
    try:
        earlier = json.loads(manifest.read_text())
    except ValueError:
        raise InputError(f"{manifest} is damaged; remove it and its feature folders to extract anew") from None
    for name, value in values.items():
        if earlier.get(name) != value:
            raise InputError(
                f"{manifest} says the features there were made with {name} {earlier.get(name)!r}, not {value!r}; "
                "choose another --features-path or remove them"
            )


def _existing(label_folder: Path) -> set[int]:
    return {int(path.stem) for path in label_folder.glob("*.npy") if path.stem.isdigit()}


def _posterior_sample(vae, images: np.ndarray, batch: range, seed: int) -> np.ndarray:
    moments = encode_moments(vae, images)
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    noise = [np.random.default_rng([seed, i]).standard_normal(shape, dtype=np.float32) for i in batch]
    return sample_moments(moments, np.stack(noise)) * vae.config.scaling_factor


def _write(folder: Path, batch: range, latents: np.ndarray, dtype: str) -> None:
    for i, latent in zip(batch, latents, strict=True):
        _save(folder / f"{i}.npy", latent[None].astype(dtype))


def _save(path: Path, array: np.ndarray) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array)

    replace_file(path, write)
