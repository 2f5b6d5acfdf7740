"""Images to squares, and what SDXL is told about it: micro-conditioning, section 2.2 of arXiv 2307.01952.

As `preprocess_train` of diffusers' `examples/text_to_image/train_text_to_image_lora_sdxl.py` (version 0.32.2) with
torchvision's transforms; only where a random number comes from differs.
"""

import numpy as np
from PIL import Image, ImageOps

from latent_diffusion.images import MAX_PIXELS

# Original height and width, top and left of the crop, target height and width.
TIME_IDS = 6


def resize_shorter_side(image: Image.Image, resolution: int) -> Image.Image:
    """`torchvision.transforms.Resize(resolution, BILINEAR)`: brings the shorter side to `resolution` pixels.

    Raises:
        ValueError: the image would then have more than `MAX_PIXELS`.
    """
    short, long = sorted(image.size)
    long = int(resolution * long / short)
    if resolution * long > MAX_PIXELS:
        raise ValueError(
            f"it has {image.width}x{image.height} pixels, which become {resolution}x{long}, more than the {MAX_PIXELS} "
            "that are taken"
        )
    size = (resolution, long) if image.width <= image.height else (long, resolution)
    return image if size == image.size else image.resize(size, Image.BILINEAR)


def mirror(image: Image.Image) -> Image.Image:
    """`torchvision.transforms.RandomHorizontalFlip(p=1.0)`."""
    return ImageOps.mirror(image)


def center_position(image: Image.Image, resolution: int) -> tuple[int, int]:
    """Top and left of the square of `resolution` pixels in the middle of an image."""
    top, left = (round((side - resolution) / 2.0) for side in (image.height, image.width))
    return top, left


def random_position(image: Image.Image, resolution: int, rng: np.random.Generator) -> tuple[int, int]:
    """`torchvision.transforms.RandomCrop.get_params`: top, then left, where the image is larger than the square."""
    top, left = (int(rng.integers(side - resolution + 1)) for side in (image.height, image.width))
    return top, left


def crop(image: Image.Image, position: tuple[int, int], resolution: int) -> np.ndarray:
    """The square of `resolution` pixels at `position` (top, left): uint8 [R, R, 3]."""
    top, left = position
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def make_time_ids(original: Image.Image, position: tuple[int, int], resolution: int) -> np.ndarray:
    """Height and width of the image as it was read, top and left of the crop, height and width of the square.

    In the order of `StableDiffusionXLPipeline._get_add_time_ids`.

    Returns:
        float32 [6].
    """
    return np.array([original.height, original.width, *position, resolution, resolution], np.float32)
