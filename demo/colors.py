"""Digits in colors: a data set of images with captions to fine-tune on, and which colors pictures have."""

import argparse
import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import command
from latent_diffusion.files import replace_file

from .captions import WORDS
from .digits import load_folder, write_digit_folders

# The brightest channel of each is 255, so that it shows the digit as white on black, see `as_white`.
COLORS = {"red": (255, 48, 48), "green": (48, 255, 72), "blue": (64, 96, 255), "yellow": (255, 224, 32)}

# Of the base pipeline, and of the data set: only this one names colors.
PLAIN_WORDINGS = ("a {digit}", "a handwritten {digit}", "the digit {digit}", "a drawing of a {digit}")
COLOR_WORDINGS = ("a {color} {digit}", "a handwritten {color} {digit}", "the digit {digit} in {color}")

PARQUET = "data/train-00000.parquet"
SEED = 0


@dataclass(frozen=True)
class Prompt:
    """What is asked for: a digit in a color."""

    digit: int
    color: str

    @property
    def text(self) -> str:
        """As the first of the wordings has it."""
        return COLOR_WORDINGS[0].format(color=self.color, digit=WORDS[self.digit])

    @property
    def is_new(self) -> bool:
        """Whether the data set has no digit of this kind in this color: one color of each digit is kept from it."""
        return list(COLORS)[self.digit % len(COLORS)] == self.color


def make_prompts() -> list[Prompt]:
    """Each digit in each color, color by color."""
    return [Prompt(digit, color) for color in COLORS for digit in range(10)]


def paint(images: np.ndarray, ink: np.ndarray, paper: np.ndarray) -> np.ndarray:
    """White on black becomes ink on paper.

    Args:
        images: gray, uint8 `[N, H, W, 3]`.
        ink, paper: a color an image, 0..255, `[N, 3]`.

    Returns:
        uint8 `[N, H, W, 3]`.
    """
    share = images.astype(np.float32) / 255
    ink, paper = (np.asarray(color, np.float32)[:, None, None] for color in (ink, paper))
    return np.rint(share * ink + (1 - share) * paper).astype(np.uint8)


def in_any_color(images: np.ndarray) -> np.ndarray:
    """White digits on black, uint8 `[N, H, W, 3]`, each in a bright color at random, pale or not."""
    rng = np.random.default_rng(SEED)
    ink = [colorsys.hsv_to_rgb(rng.random(), np.sqrt(rng.random()), 1) for _ in images]
    return paint(images, 255 * np.array(ink), np.zeros((len(images), 3)))


def in_many_colors(images: np.ndarray) -> np.ndarray:
    """White digits on black, uint8 `[N, H, W, 3]`, and as many in colors of the data set, and 2 N of any on any."""
    rng = np.random.default_rng(SEED)
    known = np.array(list(COLORS.values()))[rng.integers(len(COLORS), size=len(images))]
    any_ink, any_paper = rng.integers(256, size=(2, 2 * len(images), 3))
    return np.concatenate(
        [
            images,
            paint(images, known, np.zeros_like(known)),
            paint(np.concatenate([images, images]), any_ink, any_paper),
        ]
    )


def write_dataset(images: np.ndarray, labels: np.ndarray, folder: Path) -> int:
    """Writes a data set as Hugging Face's hub has them: `data/train-00000.parquet` with columns "image" and "text".

    Args:
        images: white on black, uint8 `[N, H, W, 3]`.
        labels: the digits, int `[N]`.
        folder: of the data set.

    Returns:
        How many images it has: one of each.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rng = np.random.default_rng(SEED)
    colors = [_draw_color(digit, rng) for digit in labels.tolist()]
    painted = paint(images, np.array([COLORS[color] for color in colors]), np.zeros((len(images), 3)))
    texts = [
        str(rng.choice(COLOR_WORDINGS)).format(color=color, digit=WORDS[digit])
        for color, digit in zip(colors, labels.tolist(), strict=True)
    ]
    encoded = [{"bytes": _png(image), "path": f"{i:05d}.png"} for i, image in enumerate(painted)]
    file = folder / PARQUET
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda path: parquet.write_table(pa.table({"image": encoded, "text": texts}), path))
    return len(texts)


def _draw_color(digit: int, rng: np.random.Generator) -> str:
    return str(rng.choice([color for color in COLORS if not Prompt(digit, color).is_new]))


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def name_colors(images: np.ndarray) -> np.ndarray:
    """The color of each picture's strokes: the nearest of "white" and `COLORS`.

    Args:
        images: uint8 `[N, H, W, 3]`, on black.

    Returns:
        Their names, `[N]`. How bright the strokes are does not matter.
    """
    names = ["white", *COLORS]
    known = np.array([(255, 255, 255), *COLORS.values()]) / 255
    pixels = images.reshape(len(images), -1, 3) / 255
    weights = np.square(pixels.max(axis=2, keepdims=True))  # strokes, hardly their edges
    found = (pixels * weights).sum(axis=1)
    found /= np.maximum(found.max(axis=1, keepdims=True), 1e-6)
    distances = np.linalg.norm(found[:, None] - known, axis=2)
    return np.array(names)[distances.argmin(axis=1)]


def as_white(images: np.ndarray) -> np.ndarray:
    """Colored strokes on black as white ones, uint8 `[N, H, W, 3]`: three times the brightest channel of each pixel."""
    return np.repeat(images.max(axis=3, keepdims=True), 3, axis=3)


def share_in_color(images: np.ndarray, colors: Sequence[str]) -> float:
    """The share, 0..1, of images (uint8 `[N, H, W, 3]`) whose strokes have the color that is named for them."""
    return float((name_colors(images) == np.array(colors)).mean())


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--images-path", type=Path, required=True, help="folder to write the white digits to")
    parser.add_argument("--dataset-path", type=Path, required=True, help="folder to write the data set to")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    write_digit_folders(arguments.images_path)
    count = write_dataset(*load_folder(arguments.images_path / "train"), arguments.dataset_path)
    print(f"{count} digits in {', '.join(COLORS)}; one color of each digit is left out, to be drawn at the end")


if __name__ == "__main__":
    main()
