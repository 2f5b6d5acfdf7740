"""Small datasets of captioned images."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
from PIL import Image


def pixels(seed: int, height: int, width: int) -> np.ndarray:
    """Random colors, uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, images: Sequence, captions: Sequence, **columns: Sequence) -> Path:
    """A file without the metadata that `datasets` adds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame({"image": images, "text": captions} | columns).to_parquet(path)
    return path


def write_image_folder(folder: Path, captions: Sequence[str | None], lines: Sequence[str] = ()) -> Path:
    """PNG images of 40x50 pixels, `0.png` onward, and `metadata.jsonl`; or `lines` in place of what it would hold."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(captions)):
        (folder / f"{i}.png").write_bytes(png(pixels(i, 40, 50)))
    lines = lines or [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join([*lines, ""]))
    return folder
