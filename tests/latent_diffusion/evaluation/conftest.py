"""Small sets of images, and an extractor that is quick and counts what it is given."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_diffusion.evaluation.extractor import Extractor
from latent_diffusion.evaluation.pixels import grid_average


class Averages(Extractor):
    """Has all three outputs, of the averages over an 8x8 grid."""

    name = "averages"
    identity = "averages-1"
    widths = {"features": 4, "spatial": 3, "logits": 5}

    def __init__(self):
        self.images = 0
        self._mix = np.random.default_rng(3).standard_normal((192, 12)).astype(np.float32)

    def __call__(self, images):
        self.images += len(images)
        mixed = (grid_average(images).reshape(len(images), -1) / 255).astype(np.float32) @ self._mix
        return {"features": mixed[:, :4], "spatial": mixed[:, 4:7], "logits": mixed[:, 7:]}


@pytest.fixture
def extractor():
    return Averages()


def random_images(count: int, seed: int = 0, size: int = 8) -> np.ndarray:
    """Noise, uint8 [N, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    """One PNG an image, as `sample_ddp.py` names them."""
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:06d}.png")
    return folder
