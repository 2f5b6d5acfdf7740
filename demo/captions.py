"""Captions of the digits as COCO's: several wordings each, with words for thickness and slant taken from the pixels."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import command
from latent_diffusion.files import replace_file

from .digits import digit_files, load_folder, write_digit_folders

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Share of a digit's images that are called thick, thin, leaning left and leaning right, each.
TRAIT_SHARE = 0.25

PLAIN_CAPTIONS = 4
CAPTIONS_PER_TRAIT = 2
SEED = 0


@dataclass(frozen=True)
class Wordings:
    """Ways to say what an image shows; {digit} is a word or a numeral, {trait} what is said of its stroke or slant."""

    plain: tuple[str, ...]
    thickness: tuple[str, ...]
    slant: tuple[str, ...]

    def all(self) -> tuple[str, ...]:
        """Those of every kind."""
        return self.plain + self.thickness + self.slant


TRAINING = Wordings(
    plain=(
        "{digit}",
        "a handwritten {digit}",
        "the digit {digit}",
        "the number {digit}",
        "a drawing of the number {digit}",
        "a picture of the digit {digit}",
        "this is the digit {digit}",
        "someone wrote the number {digit}",
        "{digit} written by hand",
        "a white {digit} on black",
    ),
    thickness=("a {trait} {digit}", "a {trait} handwritten {digit}", "the {trait} digit {digit}"),
    slant=(
        "the digit {digit} leaning {trait}",
        "a handwritten {digit} leaning {trait}",
        "the number {digit} leaning {trait}",
    ),
)

# Never trained on. Each of their words is: the text encoder is random, so that other words would mean nothing.
HELD_OUT = Wordings(
    plain=(
        "the handwritten digit {digit}",
        "a drawing of the digit {digit}",
        "a picture of a handwritten {digit}",
        "someone wrote {digit} by hand",
        "this is the number {digit} on black",
    ),
    thickness=("a drawing of a {trait} {digit}", "the {trait} number {digit}"),
    slant=("a drawing of the digit {digit} leaning {trait}", "this is {digit} leaning {trait}"),
)


@dataclass(frozen=True)
class Prompt:
    """What is asked for: a text, the digit in it, and its trait ("" for none)."""

    text: str
    digit: int
    trait: str = ""


def make_prompts(wordings: Wordings) -> list[Prompt]:
    """Fifteen prompts for each digit, in the order of the digits: seven plain ones, and two for each of four traits."""
    kinds = [(wordings.plain, "")] * 7
    kinds += [(wordings.thickness, trait) for trait in ("thick", "thick", "thin", "thin")]
    kinds += [(wordings.slant, trait) for trait in ("left", "left", "right", "right")]
    return [
        Prompt(_say(of_kind[(digit + k) % len(of_kind)], digit, trait, numeral=k % 2 == 1), digit, trait)
        for digit in range(10)
        for k, (of_kind, trait) in enumerate(kinds)
    ]


def _say(wording: str, digit: int, trait: str, numeral: bool) -> str:
    return wording.format(digit=str(digit) if numeral else WORDS[digit], trait=trait)


def ink(images: np.ndarray) -> np.ndarray:
    """How much of each image, uint8 `[N, H, W, 3]`, is written: mean brightness in 0..1, float64 `[N]`."""
    return images.mean(axis=(1, 2, 3)) / 255


def slant(images: np.ndarray) -> np.ndarray:
    """How far the top of each image, uint8 `[N, H, W, 3]`, leans to the right for its height: float64 `[N]`.

    It is the shear that second moments of the brightness give, `-mu11 / mu02` with rows counted downward: 0 for upright
    strokes, 1 for 45 degrees to the right; 0 for images without height.
    """
    weights = images.mean(axis=3)
    rows, columns = np.mgrid[: images.shape[1], : images.shape[2]]
    total = np.maximum(weights.sum(axis=(1, 2)), 1)[:, None, None]
    y = rows - (weights * rows / total).sum(axis=(1, 2), keepdims=True)
    x = columns - (weights * columns / total).sum(axis=(1, 2), keepdims=True)
    shear, height = (weights * x * y).sum(axis=(1, 2)), (weights * y * y).sum(axis=(1, 2))
    return -np.divide(shear, height, out=np.zeros_like(shear), where=height > 0)


def name_extremes(values: np.ndarray, labels: np.ndarray, low: str, high: str) -> list[str]:
    """`low` or `high` for the images whose value is far down or up among those of the same label, "" for the others.

    Args:
        values: `[N]`; compared within a label only, since an eight has more ink than a one however it is written.
        labels: int `[N]`.
    """
    names = np.full(len(values), "", dtype=object)
    for label in np.unique(labels):
        of_label = labels == label
        lowest, highest = np.quantile(values[of_label], (TRAIT_SHARE, 1 - TRAIT_SHARE))
        names[of_label & (values < lowest)] = low
        names[of_label & (values > highest)] = high
    return names.tolist()


def caption(digit: int, thickness: str, slant: str, rng: np.random.Generator) -> list[str]:
    """Captions of an image in wordings of `TRAINING`, none twice; `thickness` and `slant` are "" where it has none."""
    kinds = [(TRAINING.plain, "", PLAIN_CAPTIONS)]
    kinds += [(TRAINING.thickness, thickness, CAPTIONS_PER_TRAIT)] if thickness else []
    kinds += [(TRAINING.slant, slant, CAPTIONS_PER_TRAIT)] if slant else []
    return [
        _say(wording, digit, trait, numeral=rng.random() < 0.5)
        for wordings, trait, count in kinds
        for wording in rng.choice(wordings, count, replace=False)
    ]


def write_captions(images_path: Path, captions_file: Path) -> None:
    """Writes captions of `images_path/<digit>/*.png` in the form of COCO's `captions_train2014.json`.

    The same on every run. Raises InputError if there are no such images.
    """
    images, labels = load_folder(images_path)
    thickness = name_extremes(ink(images), labels, "thin", "thick")
    leaning = name_extremes(slant(images), labels, "left", "right")
    rng = np.random.default_rng(SEED)
    captions = [caption(*described, rng) for described in zip(labels.tolist(), thickness, leaning, strict=True)]
    names = [str(path.relative_to(images_path)) for path in digit_files(images_path)]
    replace_file(captions_file, lambda path: path.write_text(json.dumps(_as_coco(names, captions)), encoding="utf-8"))


def _as_coco(names: Iterable[str], captions: Iterable[list[str]]) -> dict:
    owners = [(image, text) for image, texts in enumerate(captions) for text in texts]
    return {
        "images": [{"id": image, "file_name": name} for image, name in enumerate(names)],
        "annotations": [
            {"id": number, "image_id": image, "caption": text} for number, (image, text) in enumerate(owners)
        ],
    }


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--images-path", type=Path, required=True, help="folder to write the digits to")
    parser.add_argument("--captions-path", type=Path, required=True, help="folder to write captions_<split>.json to")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    write_digit_folders(arguments.images_path)
    for split in ("train", "val"):
        write_captions(arguments.images_path / split, arguments.captions_path / f"captions_{split}.json")
    wordings, held_out = len(TRAINING.all()), len(HELD_OUT.all())
    print(f"captions in {wordings} wordings, as words and numerals; {held_out} more wordings are kept for the end")


if __name__ == "__main__":
    main()
