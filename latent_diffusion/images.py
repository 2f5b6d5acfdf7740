"""Images in and out: reading and cropping as ADM does, and grids to look at."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from .errors import InputError

# torchvision's, and .jpe.
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def list_image_folder(root: Path) -> tuple[list[Path], list[int], list[str]]:
    """Images below the class folders of `root`, in the order of torchvision's `ImageFolder` (`make_dataset`).

    That order is by class, then by folder, then by name; links to folders are followed.

    Returns:
        Paths, their class indices, and the class names (folder names, sorted; the index counts them).

    Raises:
        InputError: no such folder, no class folders, or a class without images.
    """
    if not root.is_dir():
        raise InputError(f"the image folder {root} does not exist; it must hold one folder a class")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not classes:
        raise InputError(f"the image folder {root} holds no class folders")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = _images_below(root / name)
        if not found:
            raise InputError(f"the class folder {root / name} holds no images")
        paths += found
        labels += [label] * len(found)
    return paths, labels, classes


def _images_below(folder: Path) -> list[Path]:
    return [
        Path(parent, name)
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(EXTENSIONS)
    ]


def read_image(path: Path, size: int) -> np.ndarray:
    """Reads an image as RGB, resized and cropped to `size` pixels square: uint8 [H, W, 3].

    Raises:
        InputError: the file cannot be read, is no image, or has pixels of no known range.
    """
    return decode_image(path, size, str(path))


def decode_image(source: Path | BinaryIO, size: int, name: str) -> np.ndarray:
    """As `read_image`, of a file or an open one; `name` says in an error which image is meant."""
    try:
        with Image.open(source) as image:
            return center_crop(_as_rgb(image), size)
    except UnidentifiedImageError:
        # Pillow's message names the Python object that was read.
        raise InputError(f"cannot read the image {name}: it is damaged or of an unknown format") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {name}: {error}") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have no known range (mode {image.mode}); save it as a PNG of 8 or 16 bits")
    if image.mode.startswith("I;16"):
        # Pillow would cut values off at 255; 65535 = 257 * 255.
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's preprocessing (`center_crop_arr`): halve with a box filter, then bicubic, then cut out the center."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def image_grid(images: np.ndarray, columns: int, row_labels: list[str] | None = None) -> Image.Image:
    """Arranges images row by row, with a label in front of each row where given.

    Args:
        images: uint8 [N, H, W, 3].
        columns: images in a row.
        row_labels: one text a row.
    """
    height, width = images.shape[1:3]
    rows = -(-len(images) // columns)
    margin = 0
    if row_labels:
        measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        margin = 12 + int(max(measure.textlength(label) for label in row_labels))
    grid = Image.new("RGB", (margin + columns * (width + 2), rows * (height + 2)), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid.paste(Image.fromarray(image), (margin + column * (width + 2) + 1, row * (height + 2) + 1))
    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(row_labels or []):
        draw.text((6, row * (height + 2) + height // 2 - 5), label, fill="black")
    return ImageOps.expand(grid, 2, "white")
