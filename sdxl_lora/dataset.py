"""Captioned images to fine-tune on, read with the `datasets` library: parquet files, or an image folder with metadata.

As diffusers' `examples/text_to_image/train_text_to_image_lora_sdxl.py` takes them. The library copies parquet files
into a cache of its own once (`HF_HOME`, `HF_DATASETS_CACHE`), which is mapped into memory; images of a folder stay
where they are. Either way they are decoded one by one, by `latent_diffusion/images.py`. Code that comes with a dataset
is never run, and no file outside of its folder is opened.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from latent_diffusion.errors import InputError
from latent_diffusion.features import images_to_check
from latent_diffusion.images import decode_rgb, naming_image, open_image
from latent_diffusion.runtime import announce

from .dataset_files import KINDS, cache_key, find_builder, image_root, is_below, quiet, read_rows


def open_dataset(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    image_column: str = "image",
    caption_column: str = "text",
    max_train_samples: int | None = None,
    seed: int = 0,
) -> "CaptionedImages":
    """Opens a dataset and says in one line how many images it has; several processes may do so at once.

    All captions and the beginnings of up to `images_to_check` images are looked at.

    Args:
        dataset_name: a folder of parquet files (as in `data/train-*.parquet`; images are the bytes of encoded files) or
            an image folder, or a name on the hub of Hugging Face. Of its splits "train" is taken, or the only one.
        dataset_config_name: which of several configurations of it.
        train_data_dir: in place of `dataset_name`, an image folder: images at any depth, and a `metadata.jsonl` or
            `metadata.csv` that gives the `file_name` of each beside its caption. Only images that it names are taken.
        image_column, caption_column: their names; a caption is a text, or a list of texts of which one is drawn.
        max_train_samples: how many images to take, after shuffling with `seed`; None for all in their order.

    Raises:
        InputError: not exactly one of `dataset_name` and `train_data_dir` is given, the dataset cannot be had or is
            damaged, has none of the columns or other values in them, or a caption is missing.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise InputError("give either --dataset_name (a folder or a name on the hub) or --train_data_dir (a folder)")
    name = dataset_name or train_data_dir
    with quiet():
        builder = find_builder(dataset_name, dataset_config_name, train_data_dir)
        table = read_rows(builder, name)
    rows = _choose(table.num_rows, max_train_samples, seed)
    root, key = image_root(builder, name), cache_key(builder)
    images = CaptionedImages(name, table, rows, image_column, caption_column, root, key)
    announce(f"dataset {name}: {len(images)} of {table.num_rows} images with captions")
    return images


class CaptionedImages:
    """Images with one caption or more each, by index; read in any process and thread, without Paddle.

    Args:
        name: of the dataset, for errors.
        table: its rows; mapped into memory.
        rows: the row of each index, int64 [N].
        image_column, caption_column: names of columns.
        root: the folder below which images are that the table has paths of; None where it must hold the images.
        key: changes with the files of the dataset.

    Raises:
        InputError: see `open_dataset`.
    """

    def __init__(
        self,
        name: str,
        table: datasets.table.Table,
        rows: np.ndarray,
        image_column: str,
        caption_column: str,
        root: Path | None,
        key: Sequence[str],
    ):
        self._name, self._table, self._rows, self._root = name, table, rows, root
        self._image_column = image_column
        if not len(rows):
            raise InputError(f"the dataset {name} has no rows")
        for flag, column, holds, is_valid in (
            ("--image_column", image_column, "images", _holds_images),
            ("--caption_column", caption_column, "texts or lists of texts", _holds_texts),
        ):
            self._check_column(flag, column, holds, is_valid)
        # In memory, as one object: texts of Python would be copied into each loader worker by counting references.
        self._captions = table.column(caption_column).take(pa.array(rows))
        self._check_captions()
        self._check_images()
        source = json.dumps([*key, image_column, caption_column]).encode()
        self._fingerprint = hashlib.sha256(source + rows.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Says in an error which image is meant."""
        value = self._value(index)
        path = value["path"].as_py() if _has_path(value.type) and value.is_valid else None
        return f"in row {self._rows[index]} (the first is 0) of {self._name}" + (f" ({path})" if path else "")

    def image(self, index: int) -> Image.Image:
        """An image as RGB, upright.

        Raises:
            InputError: it cannot be read; the message names the dataset, the row and the reason.
        """
        return decode_rgb(self._source(index), self.name(index))

    def captions(self, index: int) -> list[str]:
        """All captions of an image, at least one."""
        value = self._captions[index].as_py()
        return [value] if isinstance(value, str) else value

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """One of the captions of an image, drawn from `rng`; where there is only one, nothing is drawn."""
        captions = self.captions(index)
        return captions[rng.integers(len(captions))]

    def fingerprint(self) -> str:
        """A checksum of the dataset, its two columns and the chosen rows, in hexadecimal digits.

        Of the dataset it has what `datasets` tells its own cache by: paths and times of change of all files, or the
        commit on the hub. Reading all images would take long.
        """
        return self._fingerprint

    def _check_column(self, flag: str, column: str, holds: str, is_valid) -> None:
        schema = self._table.schema
        fitting = [field.name for field in schema if is_valid(field.type)]
        if column in fitting:
            return
        found = f"the dataset {self._name} has no column {column!r}, but {', '.join(schema.names)}"
        if column in schema.names:
            found = f"the column {column!r} of {self._name} holds {schema.field(column).type}, not {holds}"
        advice = f"give {flag} {' or '.join(fitting)}" if fitting else f"none holds {holds}; give {KINDS}"
        raise InputError(f"{found}; {advice}")

    def _check_captions(self) -> None:
        for index in range(len(self)):
            try:
                captions = self.captions(index)
            except UnicodeDecodeError:
                raise InputError(f"the caption {self.name(index)} is not UTF-8 text") from None
            if not captions or any(caption is None or not caption.strip() for caption in captions):
                raise InputError(f"there is no caption {self.name(index)}; fill it in or remove the row")

    def _check_images(self) -> None:
        for index in images_to_check(len(self)).tolist():
            source = self._source(index)
            with naming_image(self.name(index)), open_image(source):
                pass

    def _value(self, index: int) -> pa.Scalar:
        """The encoded image of a row, or the bytes and the path of one; not copied yet."""
        return self._table.column(self._image_column)[int(self._rows[index])]

    def _source(self, index: int) -> Path | io.BytesIO:
        value = self._value(index).as_py()
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is not None:
            return io.BytesIO(content)
        if path is None or self._root is None:
            raise InputError(f"there is no image {self.name(index)}; put the bytes of the encoded image there")
        # `datasets` joins folder and name without looking at them.
        if not is_below(Path(path), self._root):
            raise InputError(f"the path of the image {self.name(index)} leads out of the folder {self._root}")
        return Path(path)


def _choose(rows: int, count: int | None, seed: int) -> np.ndarray:
    """The first `count` of all rows shuffled, as `Dataset.shuffle(seed).select` gives them; all in order for None."""
    return np.arange(rows) if count is None else np.random.default_rng(seed).permutation(rows)[:count]


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _has_path(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("path") >= 0


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_texts(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
