"""Finding a dataset and reading its rows with the `datasets` library, after a look at what the library would open.

Left to itself it would run code, unpack archives, follow paths out of the folder, wait for pipes, and unfold small
files that stand for more than memory holds.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import yaml
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet

from latent_diffusion.errors import DISK_ADVICE, InputError
from latent_diffusion.reading import naming_errors, open_regular, read_bytes

# owner/name
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

# Readers of `datasets` whose files are read; that of datasets that were downloaded before has none.
_READERS = (Parquet, ImageFolder, Cache)

KINDS = "parquet files, or images with a metadata.jsonl"
_WRITE_IMAGES = "write it with the bytes of encoded images"

# What describes a dataset beside its files; of the bytes of one, and of how deep lists are in lists there.
_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
_MAX_CARD, _MAX_DEPTH = 1 << 22, 20

# Bytes of a line of metadata: of deep lists parsing takes hundreds of times as much.
_MAX_LINE = 1 << 16

# How many times its size a parquet file is at most when unpacked, unless that is little; and of its bytes those of an
# image at least, on average.
_MOST_PACKED, _LITTLE, _LEAST_IMAGE = 100, 1 << 26, 16

# Of parquet files, what is in memory at a time: rows, and bytes unless one row has more.
_MOST_ROWS, _MOST_BYTES = 64, 1 << 26


def find_builder(
    dataset_name: str | None, config_name: str | None, train_data_dir: str | None
) -> datasets.DatasetBuilder:
    """What reads a dataset; nothing but names and headers of files was read yet.

    Args: see `open_dataset`.

    Raises:
        InputError: there is no such dataset, or the library would open what it must not.
    """
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
    elif folder.exists():
        raise InputError(f"the dataset {name} is a file; give the folder that holds it, or one of it alone")
    else:
        raise InputError(f"the dataset folder {name} does not exist, and it is no name (owner/name) on the hub")
    _check_files(builder, folder.resolve(), name)
    return builder


def _load_builder(dataset: str, path: str, **settings) -> datasets.DatasetBuilder:
    with _naming_errors(dataset):
        builder = datasets.load_dataset_builder(path, trust_remote_code=False, **settings)
    if not isinstance(builder, _READERS):
        raise InputError(f"the dataset {dataset} holds files that are not read (of {builder.name}); give {KINDS}")
    return builder


def _refuse_script(folder: Path) -> None:
    """The library would want to run it, and read no data without."""
    script = folder / f"{folder.name}.py"
    if script.exists():
        raise InputError(f"{script} is a loading script, which is never run; give a folder without it, of {KINDS}")


def _check_cards(folder: Path) -> None:
    """The library would wait for pipes, unfold what stands for more than memory holds, and ask servers for files."""
    for path in (folder / name for name in _CARDS):
        if not os.path.lexists(path):
            continue
        with naming_errors(path):
            text = read_bytes(path, _MAX_CARD).decode(errors="replace")
        if path.suffix == ".json":
            continue
        if path.suffix == ".md":
            text = text.lstrip().removeprefix("---").partition("\n---")[0] if text.lstrip().startswith("---") else ""
        if not _is_plain(text):
            raise InputError(f"{path} has YAML with aliases or deep lists; write out what they stand for")
        if address := next(_addresses(text), None):
            raise InputError(
                f"{path} names {address!r:.200}, which is not in that folder; download it and name the copy"
            )


def _is_plain(text: str) -> bool:
    """Whether YAML has no aliases and no deep lists; also for what is no YAML: the library says what is wrong there."""
    depth = 0
    with contextlib.suppress(yaml.YAMLError):
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
                return False
    return True


def _addresses(text: str) -> Iterator[str]:
    """What a card names as data files that is no path: of fsspec, `protocol://` and `protocol::`."""
    with contextlib.suppress(yaml.YAMLError, ValueError):  # the library says what is wrong
        card = yaml.safe_load(text)
        values = [card.get("configs")] if isinstance(card, dict) else []
        while values:
            match values.pop():
                case str(value) if "://" in value or "::" in value:
                    yield value
                case list(items):
                    values += items
                case dict(items):
                    values += items.values()


def _check_files(builder: datasets.DatasetBuilder, root: Path, name: str) -> None:
    """Before the library opens files: a README.md can name any, and archives would be unpacked whatever their name."""
    has_parquet = False
    for files in builder.config.data_files.values():
        for path in map(Path, files):
            if not is_below(path, root):
                raise InputError(f"the README.md of the dataset {name} names {path}, which is not in that folder")
            if path.suffix == ".parquet":
                has_parquet = True
                _check_parquet(path)
            elif path.name in ImageFolder.METADATA_FILENAMES:
                _check_metadata(path)
        if isinstance(builder, ImageFolder):
            files[:] = [file for file in files if _is_of_images(Path(file))]
    if not any(builder.config.data_files.values()):
        advice = f"give --dataset_name {name}" if has_parquet else "unpack them if they are in archives"
        raise InputError(f"the dataset folder {name} holds no images; {advice}")


def _check_parquet(path: Path) -> None:
    metadata, size = _parquet_metadata(path)
    if not metadata.num_rows:
        raise InputError(f"the parquet file {path} has no rows; remove it")
    unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if unpacked > _most_unpacked(size) or metadata.num_rows * _LEAST_IMAGE > size:
        raise InputError(
            f"the parquet file {path} has {size} bytes, too few for {metadata.num_rows} images with captions that "
            f"become {unpacked} bytes; {_WRITE_IMAGES}"
        )


def _parquet_metadata(path: Path) -> tuple[pyarrow.parquet.FileMetaData, int]:
    """Of a parquet file, with its size in bytes."""
    with naming_errors(path):
        try:
            with open_regular(path) as file:
                return pyarrow.parquet.ParquetFile(file).metadata, os.fstat(file.fileno()).st_size
        except pa.ArrowException as error:
            raise InputError(f"the parquet file {path} is damaged: {_line(error)}") from None


def _most_unpacked(size: int) -> int:
    """Bytes that a parquet file of `size` bytes may become."""
    return max(_LITTLE, _MOST_PACKED * size)


def _batch_size(metadata: pyarrow.parquet.FileMetaData) -> int:
    """How many rows may be in memory at a time: each may be a copy of the largest value in a dictionary."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    chunks = [group.column(i) for group in groups for i in range(metadata.num_columns)]
    largest = max((chunk.total_uncompressed_size for chunk in chunks if chunk.has_dictionary_page), default=0)
    return max(1, min(_MOST_ROWS, _MOST_BYTES // max(1, largest)))


def _check_metadata(path: Path) -> None:
    is_empty = True
    with naming_errors(path), io.BufferedReader(open_regular(path)) as file:
        for number in itertools.count(1):
            if not (line := file.readline(_MAX_LINE + 1)):
                break
            if len(line) > _MAX_LINE:
                raise InputError(f"line {number} of {path} has more than {_MAX_LINE} bytes; it must describe one image")
            if not line.strip():
                continue
            is_empty = False
            if path.suffix == ".jsonl" and not _is_record(line):
                raise InputError(f"line {number} of {path} is no JSON object in UTF-8; it must describe one image")
    if is_empty:
        raise InputError(f"{path} is empty; it must have a line for each image")


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _is_of_images(path: Path) -> bool:
    return path.suffix.lower() in ImageFolder.EXTENSIONS or path.name in ImageFolder.METADATA_FILENAMES


def is_below(path: Path, root: Path) -> bool:
    """Whether a path, as it is written, is one in the folder `root`."""
    return path.is_relative_to(root) and ".." not in path.parts


def read_rows(builder: datasets.DatasetBuilder, name: str) -> datasets.table.Table:
    """The rows of the training split, in the library's cache.

    Raises:
        InputError: there are none, or a file is damaged.
    """
    with _naming_errors(name):
        if isinstance(builder, Parquet):
            builder._generate_tables = functools.partial(_generate_tables, builder)
        builder.download_and_prepare()
    splits = [split for split, info in builder.info.splits.items() if info.num_examples]
    if not splits:
        raise InputError(f"the dataset {name} has no rows")
    if "train" not in splits and len(splits) > 1:
        raise InputError(f"the dataset {name} has no split 'train', but {', '.join(splits)}; give a folder with one")
    with _naming_errors(name):
        return builder.as_dataset("train" if "train" in splits else splits[0]).data


def _generate_tables(builder: Parquet, files: Sequence[Iterable[str]]) -> Iterator[tuple[str, pa.Table]]:
    """What the library's reader of parquet files yields, while that is not many times what a file has.

    A value of a dictionary takes a few bytes where it comes again, so that its metadata do not say what it becomes.
    """
    for number, path in enumerate(itertools.chain.from_iterable(files)):
        metadata, size = _parquet_metadata(Path(path))
        builder.config.batch_size = _batch_size(metadata)
        unpacked = 0
        for key, table in Parquet._generate_tables(builder, [[path]]):
            unpacked += table.nbytes
            if unpacked > _most_unpacked(size):
                raise InputError(
                    f"the parquet file {path} of {size} bytes becomes more than {unpacked}; {_WRITE_IMAGES}"
                )
            yield f"{number}_{key}", table


def image_root(builder: datasets.DatasetBuilder, name: str) -> Path | None:
    """Where the images are that the rows have paths of."""
    if Path(name).is_dir():
        return Path(name).resolve() if isinstance(builder, ImageFolder) else None
    folder = huggingface_hub.file_download.repo_folder_name(repo_id=name, repo_type="dataset")
    return Path(huggingface_hub.constants.HF_HUB_CACHE) / folder


def cache_key(builder: datasets.DatasetBuilder) -> Sequence[str]:
    """The folders below the library's cache by which it tells datasets apart: name, files, version and commit."""
    return Path(builder.cache_dir).parts[-4:]


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
        raise InputError(f"cannot read the dataset {name}: {_line(cause)} (it must consist of {KINDS})") from error


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
