"""Images with their classes, for training that encodes them on the way: an image folder or tar shards."""

import io
from pathlib import Path
from typing import Protocol

import numpy as np

from latent_diffusion.errors import InputError
from latent_diffusion.features import FeatureStore
from latent_diffusion.images import decode_image, list_image_folder
from latent_diffusion.reading import naming_errors, read_bytes
from latent_diffusion.webdataset import TarImages, list_shards

from .classes import draw_label
from .configuration import DiTConfig

# Bytes of an encoded image: far more than any has that can be decoded.
MAX_IMAGE = 1 << 30


class LabeledImages(Protocol):
    """Encoded images by index, with int64 [N] `labels`."""

    labels: np.ndarray

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> bytes: ...


class FolderImages:
    """The image files of a folder that has one folder a class."""

    def __init__(self, folder: Path):
        self.paths, labels, _ = list_image_folder(folder)
        self.labels = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int) -> bytes:
        try:
            return read_bytes(self.paths[index], MAX_IMAGE)
        except OSError as error:
            raise InputError(f"cannot read the image {self.paths[index]}: {error.strerror}") from None


class ImageStore(FeatureStore):
    """Images to be encoded by the training process, mirrored half of the time.

    Args:
        data_path: a folder with one folder a class, or with `.tar` shards in WebDataset form, or one such shard.
        config: the backbone; it implies the resolution, the latent shape, the classes and the label dropout.

    Raises:
        InputError: the folder holds neither, or a class that the model has not.
    """

    def __init__(self, data_path: Path, config: DiTConfig):
        self.config, self.latent_shape = config, config.latent_shape
        with naming_errors(data_path):
            self.images: LabeledImages = TarImages(data_path) if list_shards(data_path) else FolderImages(data_path)
        if (largest := int(self.images.labels.max())) >= config.num_classes:
            raise InputError(
                f"{data_path} has images of class {largest}; the model has classes 0 to {config.num_classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """ "images" uint8 [H, W, 3], "posterior_noise" float32 [C, h, w] and "labels" int64."""
        data = io.BytesIO(self.images.read(index))
        pixels = decode_image(data, self.config.resolution, self.images.name(index))
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return {
            "images": np.ascontiguousarray(pixels),
            "posterior_noise": rng.standard_normal(self.latent_shape, dtype=np.float32),
            "labels": draw_label(int(self.images.labels[index]), self.config, rng),
        }
