"""Captioned images to fine-tune on, read with the `datasets` library: parquet files, or an image folder with metadata.

As diffusers' `examples/text_to_image/train_text_to_image_lora_sdxl.py` takes them. The library copies parquet files
into a cache of its own once (`HF_HOME`, `HF_DATASETS_CACHE`), which is mapped into memory; images of a folder stay
where they are. Either way they are decoded one by one, by `latent_diffusion/images.py`. Code that comes with a dataset
is never run, and no file outside of its folder is opened.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from latent_diffusion.errors import DISK_ADVICE, InputError
from latent_diffusion.features import images_to_check
from latent_diffusion.images import decode_rgb, naming_image, open_image
from latent_diffusion.reading import naming_errors, open_regular, read_bytes
from latent_diffusion.runtime import announce

# owner/name
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

# Readers of `datasets` whose files are read; that of datasets that were downloaded before has none.
_READERS = (Parquet, ImageFolder, Cache)

_KINDS = "parquet files, or images with a metadata.jsonl"

# What describes a dataset beside its files; of the bytes of one, and of how deep lists are in lists there.
_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
_MAX_CARD, _MAX_DEPTH = 1 << 22, 20

# Bytes of a line of metadata: of deep lists parsing takes hundreds of times as much.
_MAX_LINE = 1 << 16

# How many times its size a parquet file is at most when unpacked, unless that is little; and of its bytes those of an
# image at least, on average.
_MOST_PACKED, _LITTLE, _LEAST_IMAGE = 100, 1 << 26, 16

# Rows of parquet files that are in memory at a time.
_BATCH_SIZE = 64


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
    with _quiet():
        builder = _find(dataset_name, dataset_config_name, train_data_dir)
        table = _prepare(builder, name)
    rows = _choose(table.num_rows, max_train_samples, seed)
    images = CaptionedImages(name, table, rows, image_column, caption_column, _root(builder, name), _key(builder))
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
        path = self._stored(index)[1]
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
        advice = f"give {flag} {' or '.join(fitting)}" if fitting else f"none holds {holds}; give {_KINDS}"
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

    def _stored(self, index: int) -> tuple[bytes | None, str | None]:
        """The encoded image of a row, and its path."""
        value = self._table.column(self._image_column)[int(self._rows[index])].as_py()
        return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)

    def _source(self, index: int) -> Path | io.BytesIO:
        content, path = self._stored(index)
        if content is not None:
            return io.BytesIO(content)
        if path is None or self._root is None:
            raise InputError(f"there is no image {self.name(index)}; put the bytes of the encoded image there")
        # `datasets` joins folder and name without looking at them.
        if not _is_below(Path(path), self._root):
            raise InputError(f"the path of the image {self.name(index)} leads out of the folder {self._root}")
        return Path(path)


def _find(dataset_name: str | None, config_name: str | None, train_data_dir: str | None) -> datasets.DatasetBuilder:
    """What reads a dataset; nothing but names and headers of files was read yet."""
    name = dataset_name or train_data_dir
    folder = Path(name)
    if train_data_dir is not None:
        if not folder.is_dir():
            raise InputError(f"the folder --train_data_dir {name} does not exist")
        root = str(folder.resolve())
        builder = _load_builder(name, "imagefolder", data_dir=root, data_files={"train": "**"})
    elif folder.is_dir():
        _refuse_script(folder.resolve())
        _check_cards(folder)
        builder = _load_builder(name, str(folder.resolve()), name=config_name)
    elif _HUB_NAME.fullmatch(name) and not name.endswith(".py"):
        return _load_builder(name, name, name=config_name)
    else:
        raise InputError(f"the dataset folder {name} does not exist, and it is no name (owner/name) on the hub")
    _check_files(builder, folder.resolve(), name)
    return builder


def _load_builder(dataset: str, path: str, **settings) -> datasets.DatasetBuilder:
    with _naming_errors(dataset):
        builder = datasets.load_dataset_builder(path, trust_remote_code=False, **settings)
    if not isinstance(builder, _READERS):
        raise InputError(f"the dataset {dataset} holds files that are not read (of {builder.name}); give {_KINDS}")
    return builder


def _refuse_script(folder: Path) -> None:
    """The library would want to run it, and read no data without."""
    script = folder / f"{folder.name}.py"
    if script.exists():
        raise InputError(f"{script} is a loading script, which is never run; give a folder without it, of {_KINDS}")


def _check_cards(folder: Path) -> None:
    """The library would wait for pipes, and unfold what stands for more than memory holds."""
    for path in (folder / name for name in _CARDS):
        if not os.path.lexists(path):
            continue
        with naming_errors(path):
            text = read_bytes(path, _MAX_CARD).decode(errors="replace")
        if path.suffix == ".md":
            text = text.lstrip().removeprefix("---").partition("\n---")[0] if text.lstrip().startswith("---") else ""
        if path.suffix != ".json" and not _is_plain(text):
            raise InputError(f"{path} has YAML with aliases or deep lists; write out what they stand for")


def _is_plain(text: str) -> bool:
    """Whether YAML has no aliases and no deep lists; also for what is no YAML: the library says what is wrong there."""
    depth = 0
    with contextlib.suppress(yaml.YAMLError):
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
                return False
    return True


def _check_files(builder: datasets.DatasetBuilder, root: Path, name: str) -> None:
    """Before the library opens files: a README.md can name any, and archives would be unpacked whatever their name."""
    for files in builder.config.data_files.values():
        for path in map(Path, files):
            if not _is_below(path, root):
                raise InputError(f"the README.md of the dataset {name} names {path}, which is not in that folder")
            if path.suffix == ".parquet":
                _check_parquet(path)
            elif path.name in ImageFolder.METADATA_FILENAMES:
                _check_metadata(path)
        if isinstance(builder, ImageFolder):
            files[:] = [file for file in files if _is_of_images(Path(file))]
    if not any(builder.config.data_files.values()):
        raise InputError(f"the dataset folder {name} holds no images; unpack them if they are in archives")


def _check_parquet(path: Path) -> None:
    with naming_errors(path):
        try:
            with open_regular(path) as file:
                metadata = pyarrow.parquet.ParquetFile(file).metadata
                size = os.fstat(file.fileno()).st_size
        except pa.ArrowException as error:
            raise InputError(f"the parquet file {path} is damaged: {_line(error)}") from None
    if not metadata.num_rows:
        raise InputError(f"the parquet file {path} has no rows; remove it")
    unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if unpacked > max(_LITTLE, _MOST_PACKED * size) or metadata.num_rows * _LEAST_IMAGE > size:
        raise InputError(
            f"the parquet file {path} has {size} bytes, too few for {metadata.num_rows} images with captions that "
            f"become {unpacked} bytes; write it with the bytes of encoded images"
        )


def _check_metadata(path: Path) -> None:
    with naming_errors(path), io.BufferedReader(open_regular(path)) as file:
        for number in itertools.count(1):
            if not (line := file.readline(_MAX_LINE + 1)):
                return
            if len(line) > _MAX_LINE:
                raise InputError(f"line {number} of {path} has more than {_MAX_LINE} bytes; it must describe one image")


def _is_of_images(path: Path) -> bool:
    return path.suffix.lower() in ImageFolder.EXTENSIONS or path.name in ImageFolder.METADATA_FILENAMES


def _is_below(path: Path, root: Path) -> bool:
    return path.is_relative_to(root) and ".." not in path.parts


def _prepare(builder: datasets.DatasetBuilder, name: str) -> datasets.table.Table:
    """The rows of the training split, in the library's cache."""
    with _naming_errors(name):
        if isinstance(builder, Parquet):
            builder.config.batch_size = _BATCH_SIZE  # otherwise as many as a file says
        builder.download_and_prepare()
    splits = [split for split, info in builder.info.splits.items() if info.num_examples]
    if not splits:
        raise InputError(f"the dataset {name} has no rows")
    if "train" not in splits and len(splits) > 1:
        raise InputError(f"the dataset {name} has no split 'train', but {', '.join(splits)}; give a folder with one")
    with _naming_errors(name):
        return builder.as_dataset("train" if "train" in splits else splits[0]).data


def _choose(rows: int, count: int | None, seed: int) -> np.ndarray:
    """The first `count` of all rows shuffled, as `Dataset.shuffle(seed).select` gives them; all in order for None."""
    return np.arange(rows) if count is None else np.random.default_rng(seed).permutation(rows)[:count]


def _root(builder: datasets.DatasetBuilder, name: str) -> Path | None:
    """Where the images are that the rows have paths of."""
    if Path(name).is_dir():
        return Path(name).resolve() if isinstance(builder, ImageFolder) else None
    folder = huggingface_hub.file_download.repo_folder_name(repo_id=name, repo_type="dataset")
    return Path(huggingface_hub.constants.HF_HUB_CACHE) / folder


def _key(builder: datasets.DatasetBuilder) -> Sequence[str]:
    """The folders below the library's cache by which it tells datasets apart: name, files, version and commit."""
    return Path(builder.cache_dir).parts[-4:]


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_texts(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


@contextlib.contextmanager
def _naming_errors(name: str) -> Iterator[None]:
    """Around what the library does with a dataset: it raises whatever its readers raise."""
    try:
        yield
    except Exception as error:
        cause = _first_cause(error)
        if isinstance(cause, OSError) and cause.errno in DISK_ADVICE:
            raise cause from None
        if isinstance(cause, ConnectionError) and not Path(name).is_dir():
            raise InputError(
                f"the dataset {name!r} is neither a folder nor could it be downloaded ({type(cause).__name__}); "
                "give the path of a downloaded dataset folder"
            ) from error
        raise InputError(f"cannot read the dataset {name}: {_line(cause)} (it must consist of {_KINDS})") from error


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and notes of the library."""
    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
