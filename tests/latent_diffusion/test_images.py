import errno
import io
import math
import os

import numpy as np
import pytest
from PIL import Image, ImageDraw

from latent_diffusion import images
from latent_diffusion.errors import InputError
from latent_diffusion.images import (
    FORMATS,
    LINE_HEIGHT,
    _wrapped,
    captioned_grid,
    center_crop,
    crop_then_resize,
    decode_image,
    image_grid,
    images_below,
    list_image_folder,
    read_image,
)


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


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (47, 34), (200, 65), (128, 129), (20, 31)])
def test_the_other_crop_is_that_of_u_vit(size):
    """In the words of its `datasets.py`: cut an array, then resize."""
    pixels = np.asarray(picture(*size))
    height, width = pixels.shape[:2]
    crop = min(height, width)
    rows = slice((height - crop) // 2, (height + crop) // 2)
    square = Image.fromarray(pixels[rows, (width - crop) // 2 : (width + crop) // 2])
    expected = np.asarray(square.resize((32, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(crop_then_resize(picture(*size), 32), expected, strict=True)


def test_an_image_is_read_with_the_crop_that_is_asked_for(tmp_path):
    picture(50, 40).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png", 32, crop_then_resize), crop_then_resize(picture(50, 40), 32)
    )


def test_an_image_of_the_size_is_left_as_it_is():
    image = picture(32, 32)
    np.testing.assert_array_equal(center_crop(image, 32), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_mode_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / "image.tif"
    picture(40, 32).convert(mode).save(path)
    assert read_image(path, 32).shape == (32, 32, 3)


@pytest.mark.parametrize(("suffix", "dtype"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2")])
def test_gray_of_16_bits_is_scaled(tmp_path, suffix, dtype):
    path = tmp_path / f"gray.{suffix}"
    gray = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(dtype)
    Image.fromarray(gray).save(path)
    with Image.open(path) as image:
        assert image.mode == ("I;16B" if dtype == ">u2" else "I;16")
    found = read_image(path, 32)
    np.testing.assert_array_equal(found, np.repeat(np.rint(gray / 257)[:, :, None], 3, axis=2))


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pixels_of_no_known_range_are_refused(tmp_path, dtype, mode):
    path = tmp_path / "gray.tif"
    Image.fromarray(np.ones((32, 32), dtype)).save(path)
    with pytest.raises(InputError, match=rf"cannot read the image .*gray\.tif: .* range \(mode {mode}\); save it as"):
        read_image(path, 32)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content is None:
        picture(64, 64).save(path)
        content = path.read_bytes()[:5000]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read the image .*broken\.png"):
        read_image(path, 32)


def test_an_open_file_that_is_no_image_is_called_by_its_name():
    with pytest.raises(InputError) as error:
        decode_image(io.BytesIO(b"no image"), 32, "shard.tar, image 3")
    formats = ", ".join(FORMATS)
    assert str(error.value) == f"cannot read the image shard.tar, image 3: it is damaged or none of {formats}"


def test_an_image_of_another_format_or_too_large_is_refused_whatever_its_name_says(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 40)).save(path, "GIF")
    with pytest.raises(InputError, match="none of JPEG, PNG"):
        read_image(path, 32)
    Image.new("RGB", (40, 40)).save(path, "WEBP")
    assert read_image(path, 32).shape == (32, 32, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 1599)
    with pytest.raises(InputError, match=r"a\.jpg: it has 40x40 pixels, more than the 1599 that are read"):
        read_image(path, 32)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the image .*missing\.png"):
        read_image(tmp_path / "missing.png", 32)


def test_a_folder_is_listed_as_torchvision_does(tmp_path):
    """Folders in the order of their whole paths, each before those below it; other files are no images."""
    root = tmp_path / "root"
    expected = [
        "a/z.webp",
        "b/10.JPEG",
        "b/2.pgm",
        "b/0deep/1.png",
        "b/0deep-2/1.png",
        "b/0deep/x/1.png",
        "b/link/9.jpe",
    ]
    for name in (*expected[-2::-1], "a/notes.txt", "stray.png", "../elsewhere/9.jpe"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "a/folder.png").mkdir()
    (root / "b/link").symlink_to(tmp_path / "elsewhere")
    paths, labels, classes = list_image_folder(root)
    assert classes == ["a", "b"]
    assert [str(path.relative_to(root)) for path in paths] == expected
    assert labels == [0, 1, 1, 1, 1, 1, 1]


def test_links_that_lead_in_circles_are_followed_once(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / "class" / name).mkdir(parents=True)
        (tmp_path / "class" / name / f"{name}.png").touch()
        (tmp_path / "class" / name / "on").symlink_to(f"../{other}")
    (tmp_path / "class/up").symlink_to("..")
    paths = [str(path.relative_to(tmp_path / "class")) for path in images_below(tmp_path / "class")]
    assert paths[:4] == ["a/a.png", "a/on/b.png", "b/b.png", "b/on/a.png"] and len(paths) == 4


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """Its images would be missing without a word."""
    (tmp_path / "class/hidden").mkdir(parents=True)

    def scandir(path: str):
        if str(path).endswith("hidden"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return usual(path)

    usual = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="cannot list the images of .*hidden: Permission denied"):
        images_below(tmp_path)


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


def test_captions_are_broken_into_lines_below_their_images():
    images = np.full((3, 40, 60, 3), (10, 200, 90), np.uint8)
    texts = ["one", "some words that need more than a line", "unbreakable" * 3]
    grid = np.asarray(captioned_grid(images, texts, columns=2))
    lines = [_wrapped(text, 60).splitlines() for text in texts]
    assert [" ".join(found) for found in lines] == texts
    assert len(lines[0]) == len(lines[2]) == 1 < len(lines[1])
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    assert all(measure.textlength(line) <= 60 for line in lines[1])

    height = 40 + 4 + LINE_HEIGHT * len(lines[1]) + 2
    assert grid.shape == (2 * height + 4, 2 * 62 + 4, 3)
    tiles = [grid[2 + height * row :][:height, 2 + 62 * column :][:, :62] for row, column in ((0, 0), (0, 1), (1, 0))]
    for tile, found in zip(tiles, lines, strict=True):
        assert (tile[1:41, 1:61] == images[0]).all()
        letters = (tile[41:].min(axis=(1, 2)) < 64).nonzero()[0]
        assert letters[0] < LINE_HEIGHT and LINE_HEIGHT * (len(found) - 1) < letters[-1] <= LINE_HEIGHT * len(found) + 3
    assert (grid[2 + height :, 64:] == 255).all()


def test_captions_have_the_letters_of_other_alphabets():
    blank = np.zeros((1, 40, 40, 3), np.uint8)
    drawn = [np.asarray(captioned_grid(blank, [text], 1)) for text in ("\x00", "ü", "ñ", "ж", "λ")]
    assert len({grid.tobytes() for grid in drawn}) == len(drawn)  # no two of them the box of an unknown letter
