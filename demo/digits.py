"""The 1,797 handwritten digits inside scikit-learn, as ImageNet-style folders of PNGs."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.digits_classifier import split_digits
from latent_diffusion.files import replace_file

IMAGE_SIZE = 64


def write_digit_folders(root: Path) -> None:
    """Writes `root/train/<digit>/<index>.png` and, for a stratified held-out fifth, `root/val/<digit>/<index>.png`.

    The PNGs are 64x64 RGB, white on black; `<index>` is the digit's row in scikit-learn's data set. The split is the
    same on every run. Files that exist are left alone, so a complete folder costs nothing and an interrupted run
    continues.
    """
    digits = load_digits()
    for split, rows in zip(("train", "val"), split_digits(), strict=True):
        for row in rows:
            path = Path(root) / split / str(digits.target[row]) / f"{row:04d}.png"
            if not path.exists():
                _write_png(_render(digits.images[row]), path)


def load_folder(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads `root/<digit>/*.png`, one split as `write_digit_folders` leaves it.

    Returns images, uint8 `[N, 64, 64, 3]`, and labels, int64 `[N]`, both ordered by digit and then by file name.
    Raises InputError if there are no such files.
    """
    paths = digit_files(root)
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    labels = np.array([int(path.parent.name) for path in paths], dtype=np.int64)
    return images, labels


def digit_files(root: Path) -> list[Path]:
    """The files that `load_folder` reads, in its order; raises InputError if there are none."""
    paths = sorted(Path(root).glob("[0-9]/*.png"))
    if not paths:
        raise InputError(f"{root}: no <digit>/*.png files here; write them with demo.digits.write_digit_folders.")
    return paths


def _render(digit: np.ndarray) -> Image.Image:
    """Upscales one digit, float `[8, 8]` with values 0..16."""
    levels = np.rint(digit * (255 / 16)).astype(np.uint8)
    return Image.fromarray(levels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB")


def _write_png(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name appears only once the file is whole: an existing file is trusted by the next run.
    replace_file(path, lambda temporary: image.save(temporary, format="PNG"))
