import errno
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image

from latent_diffusion.errors import InputError
from sdxl_lora import dataset_files
from sdxl_lora.dataset import CaptionedImages, open_dataset

from .captioned import pixels, png, write_image_folder, write_parquet

IMAGES = [pixels(i, 40 + i, 50) for i in range(5)]
CAPTIONS = [f"the digit {word}" for word in ("zero", "one", "two", "three", "four")]


def write_published_layout(folder: Path) -> Path:
    """As the pokemon dataset is laid out."""
    encoded = [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(IMAGES)]
    write_parquet(folder / "data/train-0001.parquet", encoded, CAPTIONS)
    (folder / "README.MD").write_text("# Images with captions")
    (folder / "data/dataset_infos.json").write_text("{}")
    (folder / "dataset_infos.json").write_text("{}")
    return folder


def write_binary(folder: Path) -> Path:
    write_parquet(folder / "train.parquet", [png(image) for image in IMAGES], CAPTIONS)
    return folder


def write_own_format(folder: Path) -> Path:
    """Parquet that `datasets` writes says in its metadata that a column is of images."""
    folder.mkdir(parents=True)
    rows = {"image": [Image.fromarray(image) for image in IMAGES], "text": CAPTIONS}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """An image folder of three images."""
    return write_image_folder(tmp_path / "folder", ["a", "b", "c"])


def open_folder(path: Path, **settings) -> CaptionedImages:
    return open_dataset(str(path), None, None, **settings)


@pytest.mark.parametrize("write", [write_published_layout, write_binary, write_own_format])
def test_parquet_files_are_read(tmp_path, write):
    images = open_folder(write(tmp_path / "some"))
    assert len(images) == 5
    for i, (expected, caption) in enumerate(zip(IMAGES, CAPTIONS, strict=True)):
        np.testing.assert_array_equal(np.asarray(images.image(i)), expected)
        assert images.captions(i) == [caption]


@pytest.mark.parametrize("write_metadata", [None, pandas.DataFrame.to_csv])
@pytest.mark.parametrize("flag", ["dataset_name", "train_data_dir"])
def test_image_folders_are_read(folder, write_metadata, flag):
    """Files of other kinds are passed over, archives too; so are images without a line."""
    (folder / "notes.txt").write_text("notes")
    (folder / "3.png").write_bytes(png(IMAGES[3]))
    if write_metadata:
        table = pandas.read_json(folder / "metadata.jsonl", lines=True)
        write_metadata(table, folder / "metadata.csv", index=False)
        (folder / "metadata.jsonl").unlink()
    given = {"dataset_name": None, "train_data_dir": None, flag: str(folder)}
    images = open_dataset(dataset_config_name=None, **given)
    assert [images.captions(i) for i in range(len(images))] == [["a"], ["b"], ["c"]]
    np.testing.assert_array_equal(np.asarray(images.image(2)), pixels(2, 40, 50))


def test_names_with_test_in_them_are_trained_on(tmp_path):
    """`datasets` would make a split of its own of them, unless it is told which files are for training."""
    folder = write_image_folder(tmp_path / "test", ["a", "b"])
    (folder / "0.png").rename(folder / "test-0.png")
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace('"0.png"', '"test-0.png"'))
    assert len(open_dataset(None, None, str(folder))) == 2


def test_the_only_split_is_taken_whatever_its_name(tmp_path):
    write_binary(tmp_path)
    (tmp_path / "train.parquet").rename(tmp_path / "test.parquet")
    assert len(open_folder(tmp_path)) == 5
    shutil.copy(tmp_path / "test.parquet", tmp_path / "validation.parquet")
    with pytest.raises(InputError, match=f"the dataset {tmp_path} has no split 'train', but validation, test"):
        open_folder(tmp_path)


def test_one_line_says_how_many_images_there_are(tmp_path, capfd):
    open_folder(write_published_layout(tmp_path / "some"), max_train_samples=3)
    assert capfd.readouterr() == (f"dataset {tmp_path / 'some'}: 3 of 5 images with captions\n", "")
    assert not datasets.are_progress_bars_disabled()


def test_a_sample_is_what_datasets_would_take(tmp_path):
    images = open_folder(write_binary(tmp_path), max_train_samples=3, seed=7)
    rows = datasets.Dataset.from_dict({"row": range(5)}).shuffle(seed=7).select(range(3))["row"]
    assert [images.captions(i) for i in range(len(images))] == [[CAPTIONS[row]] for row in rows]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(np.asarray(images.image(i)), IMAGES[row])
        assert f"row {row} (the first is 0)" in images.name(i)
    assert len(open_folder(tmp_path, max_train_samples=9)) == 5


def test_a_caption_is_drawn_where_there_are_several(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(IMAGES[0])] * 2, [["one", "two"], ["three"]])
    images = open_folder(tmp_path)
    assert images.captions(0) == ["one", "two"]
    assert {images.caption(0, np.random.default_rng(seed)) for seed in range(20)} == {"one", "two"}
    rng = np.random.default_rng(0)
    assert images.caption(1, rng) == "three"
    assert rng.random() == np.random.default_rng(0).random()


def test_an_image_is_turned_upright(tmp_path):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the right side of what is stored is the bottom
    Image.fromarray(IMAGES[0]).save(file, "PNG", exif=exif)
    write_parquet(tmp_path / "train.parquet", [file.getvalue()], ["a"])
    np.testing.assert_array_equal(np.asarray(open_folder(tmp_path).image(0)), np.rot90(IMAGES[0], -1))


def test_the_fingerprint_is_of_files_and_choice(folder):
    found = [open_folder(folder).fingerprint() for _ in range(2)]
    assert found[0] == found[1]
    found += [open_folder(folder, max_train_samples=2, seed=seed).fingerprint() for seed in (0, 1)]
    for name in ("1.png", "metadata.jsonl"):
        os.utime(folder / name, (0, 0))
        found.append(open_folder(folder).fingerprint())
    assert len(set(found[1:])) == len(found[1:])


def test_the_fingerprint_is_of_the_columns(tmp_path):
    encoded = [png(IMAGES[0])]
    write_parquet(tmp_path / "train.parquet", encoded, ["a"], other_image=encoded, other_text=["a"])
    changes = {}, {"image_column": "other_image"}, {"caption_column": "other_text"}
    assert len({open_folder(tmp_path, **change).fingerprint() for change in changes}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "picture"}, "no column 'picture', but image, text; give --image_column image$"),
        ({"caption_column": "caption"}, "no column 'caption', but image, text; give --caption_column text$"),
        ({"image_column": "text"}, "the column 'text' of .* holds string, not images; give --image_column"),
        ({"caption_column": "image"}, "'image' of .* holds binary, not texts or lists of texts; give --caption_column"),
    ],
)
def test_a_column_that_cannot_be_is_named(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        open_folder(write_binary(tmp_path), **settings)


@pytest.mark.parametrize("captions", [["a", None], ["a", " \n"], [["a"], []], [["a"], ["b", ""]], [["a"], ["b", None]]])
def test_a_missing_caption_is_named(tmp_path, captions):
    write_parquet(tmp_path / "train.parquet", [png(image) for image in IMAGES[:2]], captions)
    with pytest.raises(InputError, match=rf"there is no caption in row 1 \(the first is 0\) of {tmp_path}; fill it in"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            {"bytes": b"no image", "path": "1.png"},
            r"cannot read the image in row 1 .* \(1.png\): it is damaged",
        ),
        ({"bytes": None, "path": "{root}/0.png"}, "there is no image in row 1 .*0.png.; put the bytes of the encoded"),
        (None, "there is no image in row 1"),
    ],
)
def test_an_image_that_is_missing_or_none_is_named_at_the_start(tmp_path, image, message):
    """A path in a parquet file could lead anywhere on the disk; none is followed."""
    (tmp_path / "0.png").write_bytes(png(IMAGES[0]))
    if image and image["bytes"] is None:
        image = image | {"path": image["path"].format(root=tmp_path)}
    write_parquet(tmp_path / "data/train.parquet", [{"bytes": png(IMAGES[0]), "path": "0.png"}, image], ["a", "b"])
    with pytest.raises(InputError, match=message):
        open_folder(tmp_path / "data")


def test_an_image_that_is_cut_off_is_named_when_it_is_read(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(IMAGES[0]), png(IMAGES[1])[:3000]], ["a", "b"])
    images = open_folder(tmp_path)
    images.image(0)
    with pytest.raises(InputError, match=rf"cannot read the image in row 1 \(the first is 0\) of {tmp_path}: "):
        images.image(1)


@pytest.mark.parametrize("name", ["../outside/0.png", "{outside}/0.png", "../folder/../outside/0.png"])
def test_metadata_cannot_name_a_file_outside_of_its_folder(tmp_path, name):
    outside = write_image_folder(tmp_path / "outside", ["a"])
    line = json.dumps({"file_name": name.format(outside=outside), "text": "a"})
    folder = write_image_folder(tmp_path / "folder", ["a"], [line])
    with pytest.raises(InputError, match=f"the path of the image in row 0 .* leads out of the folder {folder}"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['{"file_name": "0.png", "text": "a"}', '{"file_name":'],
            "line 2 of .*folder/metadata.jsonl is no JSON object in UTF-8; it must describe one image",
        ),
        (['{"file_name": "0.png", "text": "\\ud800"}', "[1]"], "line 2 of .*metadata.jsonl is no JSON object"),
        (["", " "], "metadata.jsonl is empty; it must have a line for each image"),
        (['{"name": "0.png", "text": "a"}'], "cannot read the dataset .*folder: `file_name`"),
        (['{"file_name": "7.png", "text": "a"}'], "cannot read the image in row 0 .*7.png.*No such file"),
        (['{"file_name": "0.png", "text": ""}'], "there is no caption in row 0 .*folder/0.png.; fill it in"),
        (
            ['{"file_name": "0.png"}'],
            "but image; none holds texts or lists of texts; give .* metadata.jsonl",
        ),
    ],
)
def test_metadata_that_cannot_be_used_are_named(tmp_path, lines, message):
    folder = write_image_folder(tmp_path / "folder", ["a"], lines)
    with pytest.raises(InputError, match=message):
        open_dataset(None, None, str(folder))


@pytest.mark.parametrize("content", [b"PAR1 and no more", b"", b"PK\3\4"])
def test_a_damaged_parquet_file_is_named(tmp_path, content):
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(InputError, match=f"the parquet file {tmp_path}/train.parquet is damaged: "):
        open_folder(tmp_path)


def test_a_parquet_file_that_is_damaged_within_is_an_error(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", [png(image) for image in IMAGES], CAPTIONS)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(200) + content[204:])
    with pytest.raises(InputError, match=f"cannot read the dataset {tmp_path}: "):
        open_folder(tmp_path)


def test_a_dataset_without_rows_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [], [])
    with pytest.raises(InputError, match=f"the parquet file {tmp_path}/train.parquet has no rows; remove it"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "doesn't contain any data files .it must consist of parquet files, or images with a metadata.jsonl"),
        (["table.csv"], r"holds files that are not read \(of csv\); give parquet files, or images with a metadata"),
    ],
)
def test_a_folder_without_images_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=message):
        open_folder(tmp_path)
    with pytest.raises(InputError, match="holds no images; unpack them if they are in archives|has no rows"):
        open_dataset(None, None, str(tmp_path))


def test_parquet_under_the_other_flag_is_explained(tmp_path):
    write_binary(tmp_path)
    with pytest.raises(
        InputError, match=f"the dataset folder {tmp_path} holds no images; give --dataset_name {tmp_path}"
    ):
        open_dataset(None, None, str(tmp_path))
    with pytest.raises(InputError, match=r"train.parquet is a file; give the folder that holds it"):
        open_folder(tmp_path / "train.parquet")


def test_archives_are_not_unpacked(folder, datasets_cache):
    for name in ("more.zip", "more.txt"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("9.png", png(IMAGES[0]))
    assert len(open_dataset(None, None, str(folder))) == 3
    assert not list((datasets_cache / "downloads").rglob("*.png"))


def test_code_of_a_dataset_is_not_run(tmp_path):
    folder = write_binary(tmp_path / "some")
    (folder / "some.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match=f"{folder}/some.py is a loading script, which is never run"):
        open_folder(folder)
    assert not (tmp_path / "ran").exists()


def test_code_on_the_hub_is_not_trusted(monkeypatch):
    def find(path, trust_remote_code=None, **settings):
        assert trust_remote_code is False
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset_builder", find)
    with pytest.raises(InputError, match="could it be downloaded"):
        open_dataset("owner/some", None, None)


@pytest.mark.parametrize("pattern", ["../outside/*.parquet", "{outside}/*.parquet"])
def test_a_readme_cannot_name_files_outside_of_the_folder(tmp_path, pattern):
    outside, folder = write_binary(tmp_path / "outside"), write_binary(tmp_path / "some")
    configs = f"- config_name: default\n  data_files: {pattern.format(outside=outside)}"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    with pytest.raises(InputError, match=f"the README.md of the dataset {folder} names .*outside/train.parquet"):
        open_folder(folder)


@pytest.mark.parametrize("setting", ["data_files: {}", "data_files: [{{split: train, path: {}}}]", "data_dir: {}"])
@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.parquet", "hf://datasets/owner/some", "zip::file:///x.zip"])
def test_a_readme_cannot_name_files_on_a_server(tmp_path, setting, address):
    folder = write_binary(tmp_path / "some")
    configs = f"- config_name: default\n  {setting.format(repr(address))}"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    with pytest.raises(InputError, match=re.escape(f"{folder / 'README.md'} names {address!r}, which is not in")):
        open_folder(folder)


def test_a_readme_may_have_links(tmp_path):
    folder = write_binary(tmp_path / "some")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_link: https://example.org/terms\n---\n")
    assert len(open_folder(folder)) == len(IMAGES)


def test_configurations_are_those_of_the_readme(tmp_path):
    for name in ("small", "large"):
        count = 1 if name == "small" else 3
        write_parquet(tmp_path / f"{name}/x.parquet", [png(image) for image in IMAGES[:count]], CAPTIONS[:count])
    configs = "\n".join(f"- config_name: {name}\n  data_files: {name}/*.parquet" for name in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    assert len(open_dataset(str(tmp_path), "large", None)) == 3
    with pytest.raises(InputError, match=f"cannot read the dataset {tmp_path}: .*other.* not found.*small.*large"):
        open_dataset(str(tmp_path), "other", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/some", r"the dataset 'owner/some' is neither a folder nor could it be downloaded \(ConnectionError\)"),
        ("some", "the dataset folder some does not exist, and it is no name"),
        ("parquet", "the dataset folder parquet does not exist"),
        ("/nowhere/some", "the dataset folder /nowhere/some does not exist"),
        ("owner/some.py", "the dataset folder owner/some.py does not exist"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_named(monkeypatch, name, message):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message):
        open_dataset(name, None, None)


def test_a_dataset_that_was_downloaded_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    open_folder(write_binary(tmp_path / "some"))
    [info] = (tmp_path / "cache").rglob("dataset_info.json")
    shutil.copytree(info.parent, tmp_path / "cache/owner___some/default/0.0.0/0123")
    assert len(open_dataset("owner/some", None, None)) == 5


@pytest.mark.parametrize("given", [(None, None), ("owner/some", "folder")])
def test_exactly_one_source_is_given(given):
    with pytest.raises(InputError, match="give either --dataset_name .* or --train_data_dir"):
        open_dataset(given[0], None, given[1])


def test_a_train_data_dir_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(InputError, match=f"the folder --train_data_dir {tmp_path}/none does not exist"):
        open_dataset(None, None, str(tmp_path / "none"))


def test_a_full_disk_is_no_fault_of_the_dataset(tmp_path, monkeypatch):
    def fail(self):
        raise datasets.exceptions.DatasetGenerationError("failed") from OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(dataset_files.Parquet, "download_and_prepare", fail)
    with pytest.raises(OSError, match="No space left"):
        open_folder(write_binary(tmp_path))


def _report(path: Path, answers: multiprocessing.SimpleQueue) -> None:
    images = open_folder(path)
    answers.put((len(images), images.fingerprint(), np.asarray(images.image(4)).tobytes()))


def test_processes_open_a_dataset_at_the_same_time(tmp_path):
    write_binary(tmp_path / "some")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_report, args=(tmp_path / "some", answers)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    images = open_folder(tmp_path / "some")
    assert found == [(5, images.fingerprint(), IMAGES[4].tobytes())] * 3


def test_images_are_pickled_without_their_files(tmp_path):
    large = [png(pixels(i, 100, 100)) for i in range(20)]
    write_parquet(tmp_path / "train.parquet", large, ["a"] * 20)
    images = open_folder(tmp_path)
    pickled = pickle.dumps(images)
    assert len(pickled) < len(large[0])
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickled).image(3)), pixels(3, 100, 100))
