"""Images in and out: reading and cropping as ADM or U-ViT does, and grids to look at."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from .errors import InputError
from .reading import naming_errors, open_regular

# torchvision's, and .jpe.
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What Pillow may take an image for, whatever its name says. Its other readers are older and less tried, and that of
# PostScript starts Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")

# Pixels of an image: above them Pillow warns. As RGB they take 268 MB.
MAX_PIXELS = 1024**3 // 12

# Pixels of a line of captions, and of its letters.
LINE_HEIGHT, FONT_SIZE = 11, 9


def list_image_folder(root: Path) -> tuple[list[Path], list[int], list[str]]:
    """Images below the class folders of `root`, in the order of torchvision's `ImageFolder` (`make_dataset`).

    That order is by class, then by folder, then by name; links to folders are followed.

    Returns:
        Paths, their class indices, and the class names (folder names, sorted; the index counts them).

    Raises:
        InputError: no such folder, no class folders, or a class without images.
    """
    with naming_errors(root):
        if not root.is_dir():
            raise InputError(f"the image folder {root} does not exist; it must hold one folder a class")
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not classes:
        raise InputError(f"the image folder {root} holds no class folders")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = images_below(root / name)
        if not found:
            raise InputError(f"the class folder {root / name} holds no images")
        paths += found
        labels += [label] * len(found)
    return paths, labels, classes


def images_below(folder: Path) -> list[Path]:
    """Images in a folder at any depth, by folder and then by name; links to folders are followed, unless in circles.

    Raises:
        InputError: a folder cannot be listed.
    """
    return [Path(parent, name) for parent, names in sorted(_walk(str(folder), ())) for name in names]


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str]]]:
    """Each folder from `folder` on with its images, sorted; `above` identifies those that it was reached through."""
    try:
        status = os.stat(folder)  # noqa: PTH116
        path = (*above, (status.st_dev, status.st_ino))
        if path[-1] in above:
            return
        with os.scandir(folder) as entries:
            folders, names = [], []
            for entry in entries:
                (folders if entry.is_dir() else names).append(entry.name)
    except OSError as error:
        raise InputError(f"cannot list the images of {error.filename or folder}: {error.strerror}") from None
    yield folder, sorted(name for name in names if name.lower().endswith(EXTENSIONS))
    for name in folders:
        yield from _walk(os.path.join(folder, name), path)  # noqa: PTH118


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's preprocessing (`center_crop_arr`): halve with a box filter, then bicubic, then cut out the center."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def crop_then_resize(image: Image.Image, size: int) -> np.ndarray:
    """U-ViT's preprocessing for COCO (`center_crop` in `datasets.py`): cut out the center square, then Lanczos."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), resample=Image.LANCZOS))


# How an image becomes pixels uint8 [size, size, 3].
Crop = Callable[[Image.Image, int], np.ndarray]


def read_image(path: Path, size: int, crop: Crop = center_crop) -> np.ndarray:
    """Reads an image as RGB, resized and cropped to `size` pixels square: uint8 [H, W, 3].

    Raises:
        InputError: the file cannot be read, is no image, or has pixels of no known range.
    """
    return decode_image(path, size, str(path), crop)


def decode_image(source: Path | BinaryIO, size: int, name: str, crop: Crop = center_crop) -> np.ndarray:
    """As `read_image`, of a file or an open one; `name` says in an error which image is meant."""
    with naming_image(name), open_image(source) as image:
        return crop(_as_rgb(image), size)


def decode_rgb(source: Path | BinaryIO, name: str) -> Image.Image:
    """A whole image as RGB, turned upright as its EXIF says; as `decode_image` otherwise."""
    with naming_image(name), open_image(source) as image:
        return _as_rgb(ImageOps.exif_transpose(image))


@contextlib.contextmanager
def naming_image(name: str) -> Iterator[None]:
    """Around what reads the image called `name`: says in one sentence why it cannot be read.

    Raises:
        InputError: in place of any exception.
    """
    try:
        yield
    except Exception as error:  # a damaged file can make Pillow raise anything
        raise InputError(f"cannot read the image {name}: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def open_image(source: Path | BinaryIO) -> Iterator[Image.Image]:
    """An image of one of `FORMATS`, which is decoded when its pixels are asked for.

    Raises:
        OSError: it is no regular file, or no image of these formats.
        ValueError: it has more than `MAX_PIXELS`.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_regular(source)) if isinstance(source, Path) else source
        try:
            image = stack.enter_context(Image.open(file, formats=FORMATS))
        except UnidentifiedImageError:
            # Pillow's message names the Python object that was read.
            raise OSError(f"it is damaged or none of {', '.join(FORMATS)}") from None
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width}x{image.height} pixels, more than the {MAX_PIXELS} that are read")
        yield image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have no known range (mode {image.mode}); save it as a PNG of 8 or 16 bits")
    if image.mode.startswith("I;16"):
        # Pillow would cut values off at 255; 65535 = 257 * 255.
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return image.convert("RGB")


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


def captioned_grid(images: np.ndarray, captions: Sequence[str], columns: int) -> Image.Image:
    """Arranges images row by row, each with its caption below, broken into lines of the image's width.

    Args:
        images: uint8 [N, H, W, 3].
        captions: one text an image.
        columns: images in a row.
    """
    height, width = images.shape[1:3]
    texts = [_wrapped(caption, width) for caption in captions]
    below = 4 + LINE_HEIGHT * max(text.count("\n") + 1 for text in texts)
    tiles = []
    for image, text in zip(images, texts, strict=True):
        tile = Image.new("RGB", (width, height + below), "white")
        tile.paste(Image.fromarray(image), (0, 0))
        ImageDraw.Draw(tile).multiline_text((1, height + 2), text, fill="black", font=_font(), spacing=0)
        tiles.append(np.asarray(tile))
    return image_grid(np.stack(tiles), columns)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """matplotlib's, which has the letters of most alphabets; Pillow's own has those of English."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), FONT_SIZE)


def _wrapped(text: str, width: int) -> str:
    """Breaks a text into lines of at most `width` pixels; a longer word has a line of its own."""
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and measure.textlength(longer, _font()) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
