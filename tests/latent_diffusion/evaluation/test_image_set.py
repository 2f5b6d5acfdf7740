import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.image_set import image_files, open_images
from latent_diffusion.extraction import batches
from latent_diffusion.images import center_crop

from .conftest import random_images, write_folder


def read_all(images, size=3):
    return np.concatenate([pixels for _, pixels in images.read_ahead(batches(images.count, size))])


def test_a_folder_and_its_archive_hold_the_same_images(tmp_path):
    pixels = random_images(7)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    folder, archive = open_images(write_folder(tmp_path / "a", pixels)), open_images(tmp_path / "a.npz")
    assert folder.count == archive.count == 7
    assert np.array_equal(read_all(folder), pixels)
    assert np.array_equal(read_all(archive), pixels)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_batch_of_an_archive_can_be_read_alone(tmp_path, save):
    pixels = random_images(9)
    save(tmp_path / "a.npz", arr_0=pixels, mu=np.zeros(3))
    found = dict(open_images(tmp_path / "a.npz").read_ahead([range(2, 4), range(7, 9)]))
    assert np.array_equal(found[range(2, 4)], pixels[2:4])
    assert np.array_equal(found[range(7, 9)], pixels[7:])


def test_images_are_found_at_any_depth(tmp_path):
    write_folder(tmp_path / "b" / "deep", random_images(2))
    write_folder(tmp_path / "a", random_images(1))
    (tmp_path / "a" / "settings.json").write_text("{}")
    names = [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)]
    assert names == ["a/000000.png", "b/deep/000000.png", "b/deep/000001.png"]


def test_files_named_by_numbers_are_ordered_by_number(tmp_path):
    for number in (10, 9, 100):
        Image.fromarray(random_images(1)[0]).save(tmp_path / f"{number}.png")
    assert [path.stem for path in image_files(tmp_path)] == ["9", "10", "100"]


def test_images_of_another_size_need_to_be_cropped(tmp_path):
    folder = write_folder(tmp_path / "a", random_images(2))
    Image.fromarray(random_images(1, size=20)[0]).resize((30, 20)).save(folder / "000002.png")
    with pytest.raises(InputError, match="000002.png: it has 30x20 pixels, the first one 8x8; bring them to one size"):
        read_all(open_images(folder))
    cropped = read_all(open_images(folder, (8, center_crop)))
    assert cropped.shape == (3, 8, 8, 3)
    assert np.array_equal(cropped[:2], random_images(2))


def test_an_archive_is_cropped_as_a_folder_is(tmp_path):
    pixels = random_images(3, size=24)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    folder = open_images(write_folder(tmp_path / "a", pixels), (8, center_crop))
    assert np.array_equal(read_all(open_images(tmp_path / "a.npz", (8, center_crop))), read_all(folder))


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "a" / "deep", random_images(2))
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "a" / "deep" / "loop").symlink_to(tmp_path)
    names = [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)]
    assert names == [f"{folder}/deep/00000{i}.png" for folder in "ab" for i in range(2)]


def test_a_copy_that_keeps_its_times_is_told_apart(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=random_images(3))
    before, status = open_images(tmp_path / "a.npz").fingerprint, (tmp_path / "a.npz").stat()
    np.savez(tmp_path / "a.npz", arr_0=random_images(3, seed=1))
    os.utime(tmp_path / "a.npz", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_images(tmp_path / "a.npz").fingerprint != before


def test_fingerprints_change_with_the_images_and_the_crop(tmp_path):
    folder = write_folder(tmp_path / "a", random_images(3))
    first = open_images(folder).fingerprint
    assert open_images(folder).fingerprint == first
    assert open_images(folder, (8, center_crop)).fingerprint != first
    Image.fromarray(random_images(1, seed=1)[0]).save(folder / "000001.png", compress_level=0)
    assert open_images(folder).fingerprint != first


@pytest.mark.parametrize("shape", [(5, 8, 8, 3), (3 * 10**9, 8, 8, 3), (-5, 8, 8, 3)])
def test_an_archive_that_is_not_as_large_as_it_says_is_named(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with pytest.raises(InputError, match=r"cannot read arr_0 of .*a\.npz: its size is not what it says"):
        open_images(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "holds no array arr_0"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, r"float32 \[2, 8, 8, 3\]; images are uint8"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"uint8 \[2, 3, 8, 8\]; images are uint8"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8))}, "Fortran"),
    ],
)
def test_what_is_no_archive_of_images_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_images(tmp_path / "a.npz")


def test_what_is_not_there_or_empty_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no images"):
        open_images(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match="is no folder of images and no .npz file"):
        open_images(tmp_path / "a.txt")
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"cannot read arr_0 of .*a\.npz"):
        open_images(tmp_path / "a.npz")
