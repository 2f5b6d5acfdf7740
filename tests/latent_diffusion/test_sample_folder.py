import zipfile

import numpy as np
import pytest
from PIL import Image

from latent_diffusion import sample_folder
from latent_diffusion.errors import InputError
from latent_diffusion.sample_folder import SampleFolder

SETTINGS = {"seed": 0, "sampler": "ddpm"}
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path) -> SampleFolder:
    """Three images are wanted, the last is there."""
    folder = SampleFolder(tmp_path / "samples" / "cfg-1.5-seed-0", 3)
    folder.prepare(SETTINGS)
    folder.save(2, IMAGES[2])
    return folder


def test_missing_images_are_those_wanted_and_not_there(folder):
    assert folder.missing(range(5)) == [0, 1] and folder.finished() == 1
    assert (folder.path / "000002.png").is_file()


def test_an_image_appears_only_when_it_is_complete(folder, monkeypatch):
    def fail(self, path, format):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        folder.save(0, IMAGES[0])
    assert folder.missing(range(3)) == [0, 1] and not list(folder.path.glob(".*"))


def test_the_archive_holds_the_images_in_order(folder):
    for index in (1, 0):
        folder.save(index, IMAGES[index])
    path = folder.write_npz()
    assert path.name == "cfg-1.5-seed-0.npz" and path.parent == folder.path.parent
    with np.load(path) as archive:
        assert archive.files == ["arr_0"] and archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_0"], IMAGES[:3])
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("arr_0.npy").date_time == (1980, 1, 1, 0, 0, 0)  # the same bytes at any time


@pytest.mark.parametrize(
    ("index", "image", "message"),
    [(1, IMAGES[1][:-1], "000001.png has the shape"), (1, None, "cannot read .*000001.png"), (0, None, "000000.png")],
)
def test_a_bad_image_is_named_and_leaves_no_archive(folder, index, image, message):
    for k in (0, 1):
        folder.save(k, IMAGES[k])
    if image is None:
        (folder.path / f"{index:06d}.png").write_bytes(b"not a picture")
    else:
        folder.save(index, image)
    with pytest.raises(InputError, match=message):
        folder.write_npz()
    assert list(folder.path.parent.iterdir()) == [folder.path]


def test_a_later_run_continues_and_removes_what_was_being_written(folder):
    (folder.path / ".000000.png.0.tmp").write_bytes(b"half")
    again = SampleFolder(folder.path, 4)
    again.prepare(dict(SETTINGS))
    assert again.missing(range(5)) == [0, 1, 3] and not list(folder.path.glob(".*"))


def test_other_settings_are_refused(folder):
    with pytest.raises(InputError, match="was made with sampler 'ddpm', not 'ddim'; take another --sample-dir"):
        folder.prepare(SETTINGS | {"sampler": "ddim"})
    with pytest.raises(InputError, match="was made with dtype None, not 'fp16'"):
        folder.prepare(SETTINGS | {"dtype": "fp16"})


@pytest.mark.parametrize("text", ["{", "3", "[1]", '[["a", 1], [2, 3]]', "[" * 100_000])
def test_damaged_settings_are_named(folder, text):
    (folder.path / "settings.json").write_text(text)
    with pytest.raises(InputError, match="cannot read .*settings.json"):
        folder.prepare(SETTINGS)


def test_images_beyond_those_wanted_are_refused(folder):
    with pytest.raises(InputError, match="holds 000002.png .*not among the 2 images asked for"):
        SampleFolder(folder.path, 2).prepare(SETTINGS)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(InputError, match="has no settings.json"):
        SampleFolder(tmp_path, 3).prepare(SETTINGS)
    with pytest.raises(InputError, match="has no settings.json"):
        SampleFolder(tmp_path / "photo.png", 3).prepare(SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_waiting_ends_when_the_others_are_done(folder, monkeypatch):
    looks = []

    def others_write(seconds):
        index = folder.missing(range(3))[0]
        folder.save(index, IMAGES[index])

    monkeypatch.setattr(sample_folder.time, "sleep", others_write)
    folder.wait(lambda: looks.append(folder.finished()))
    assert looks == [1, 2, 3]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file.txt").touch()
    with pytest.raises(InputError, match="cannot make or write into the folder .*file.txt/a "):
        SampleFolder(tmp_path / "file.txt" / "a", 3).prepare(SETTINGS)
