import math

import numpy as np
import pytest
from PIL import Image

from latent_diffusion.errors import InputError
from latent_diffusion.images import center_crop, image_grid, list_image_folder, read_image


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The preprocessing in other words: the number of halvings in closed form, one crop by box."""
    short = min(image.size)
    halvings = max(0, math.floor(math.log2(short / size)))
    width, height = image.size
    for _ in range(halvings):
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    factor = size / min(width, height)
    image = image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(
    "size", [(32, 32), (33, 47), (64, 64), (63, 200), (200, 65), (128, 129), (301, 137), (20, 31), (7, 9)]
)
def test_the_crop_is_that_of_adm(size):
    image = picture(*size)
    cropped = center_crop(image, 32)
    assert cropped.shape == (32, 32, 3) and cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, adm_center_crop(image, 32))


def test_an_image_of_the_size_is_left_as_it_is():
    image = picture(32, 32)
    np.testing.assert_array_equal(center_crop(image, 32), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_mode_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / "image.tif"
    picture(40, 32).convert(mode).save(path)
    assert read_image(path, 32).shape == (32, 32, 3)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content is None:
        picture(64, 64).save(path)
        content = path.read_bytes()[:5000]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read the image .*broken\.png"):
        read_image(path, 32)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the image .*missing\.png"):
        read_image(tmp_path / "missing.png", 32)


def test_a_folder_is_listed_as_torchvision_does(tmp_path):
    """Classes by sorted name, images by sorted path within, nested folders included; other files are no images."""
    for name in ("b/2.png", "b/10.JPEG", "b/deep/1.png", "a/z.webp", "a/notes.txt", "stray.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths, labels, classes = list_image_folder(tmp_path)
    assert classes == ["a", "b"]
    assert [str(path.relative_to(tmp_path)) for path in paths] == ["a/z.webp", "b/10.JPEG", "b/2.png", "b/deep/1.png"]
    assert labels == [0, 1, 1, 1]


def test_folder_errors_name_the_folder(tmp_path):
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        list_image_folder(tmp_path / "nowhere")
    (tmp_path / "stray.png").touch()
    with pytest.raises(InputError, match="holds no class folders"):
        list_image_folder(tmp_path)
    (tmp_path / "cats").mkdir()
    with pytest.raises(InputError, match="the class folder .*cats holds no images"):
        list_image_folder(tmp_path)


@pytest.mark.parametrize(("count", "columns", "rows"), [(8, 4, 2), (5, 4, 2), (1, 1, 1)])
def test_a_grid_has_room_for_every_image(count, columns, rows):
    images = np.zeros((count, 6, 10, 3), np.uint8)
    grid = np.asarray(image_grid(images, columns))
    assert grid.shape == (rows * 8 + 4, columns * 12 + 4, 3)
    assert (grid == 0).all(axis=-1).sum() == count * 60


def test_a_grid_is_filled_row_by_row():
    images = np.repeat(np.arange(6, dtype=np.uint8), 4 * 4 * 3).reshape(6, 4, 4, 3)
    grid = np.asarray(image_grid(images, columns=3))[..., 0]
    np.testing.assert_array_equal(grid[5::6, 5::6][:2, :3], [[0, 1, 2], [3, 4, 5]])


def test_labels_are_written_before_their_rows():
    images = np.full((4, 20, 20, 3), 255, np.uint8)
    plain, labeled = image_grid(images, 2), image_grid(images, 2, ["one", "another"])
    assert labeled.height == plain.height and labeled.width > plain.width + 12
    margin = np.asarray(labeled)[:, : labeled.width - plain.width]
    assert (margin[:24] < 128).any() and (margin[24:] < 128).any()
