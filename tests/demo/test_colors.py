import io

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pyarrow import parquet

from demo.captions import WORDS
from demo.colors import (
    COLORS,
    PARQUET,
    Prompt,
    as_white,
    in_any_color,
    in_many_colors,
    make_prompts,
    name_colors,
    paint,
    share_in_color,
    write_dataset,
)


def strokes(count: int) -> np.ndarray:
    """White strokes with gray edges on black, uint8 `[count, 64, 64, 3]`."""
    large = Image.new("RGB", (256, 256))
    ImageDraw.Draw(large).line([(128, 20), (90, 236)], fill="white", width=24)
    return np.stack([np.asarray(large.resize((64, 64), Image.Resampling.BICUBIC))] * count)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The data set of four of each digit: images, uint8 `[40, 64, 64, 3]`, captions and digits."""
    folder = tmp_path_factory.mktemp("colors")
    labels = np.repeat(np.arange(10), 4)
    assert write_dataset(strokes(40), labels, folder) == 40
    table = parquet.read_table(folder / PARQUET).to_pydict()
    images = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in table["image"]]
    return np.stack(images), table["text"], labels


def test_white_becomes_ink_and_black_becomes_paper():
    image = np.array([0, 255, 51], np.uint8).reshape(1, 1, 3, 1).repeat(3, axis=3)
    painted = paint(image, np.array([[200, 100, 0]]), np.array([[0, 50, 250]]))
    assert painted.dtype == np.uint8
    assert painted[0, 0].tolist() == [[0, 50, 250], [200, 100, 0], [40, 60, 200]]


def test_captions_name_the_digit_and_the_color_of_the_image(rows):
    images, captions, labels = rows
    words = [set(caption.split()) for caption in captions]
    assert all(WORDS[digit] in said for digit, said in zip(labels, words, strict=True))
    colors = [next(color for color in COLORS if color in said) for said in words]
    assert len(set(colors)) == len(COLORS)
    assert share_in_color(images, colors) == 1


def test_the_color_of_each_digit_that_is_new_is_not_in_the_data_set(rows):
    _, captions, labels = rows
    for prompt in filter(lambda prompt: prompt.is_new, make_prompts()):
        of_digit = [caption for caption, digit in zip(captions, labels, strict=True) if digit == prompt.digit]
        assert not any(prompt.color in caption for caption in of_digit)


def test_prompts_ask_for_each_digit_in_each_color_and_one_color_of_each_is_new():
    prompts = make_prompts()
    assert len({prompt.text for prompt in prompts}) == 10 * len(COLORS)
    assert sorted(prompt.digit for prompt in prompts if prompt.is_new) == list(range(10))
    assert Prompt(3, "red").text == "a red three"


@pytest.mark.parametrize("brightness", [1.0, 0.6])
def test_colors_are_named_however_bright(brightness):
    inks = np.array([(255, 255, 255), *COLORS.values()]) * brightness
    painted = paint(strokes(len(inks)), inks, np.zeros_like(inks))
    assert name_colors(painted).tolist() == ["white", *COLORS]


def test_colored_digits_show_as_white_ones():
    images = strokes(len(COLORS))
    painted = paint(images, np.array(list(COLORS.values())), np.zeros((len(COLORS), 3)))
    np.testing.assert_array_equal(as_white(painted), images)


def test_digits_are_painted_in_colors_of_all_kinds_on_black():
    images = in_any_color(strokes(100))
    assert set(name_colors(images)) == {"white", *COLORS}
    np.testing.assert_array_equal(as_white(images), strokes(100))
    assert (images[:, 0, 0] == 0).all()


def test_many_colors_are_the_white_ones_those_of_the_data_set_and_any():
    images = in_many_colors(strokes(20))
    assert len(images) == 80
    assert set(name_colors(images[:20])) == {"white"}
    assert set(name_colors(images[20:40])) == set(COLORS)
    assert (images[20:40, 0, 0] == 0).all()
    assert len(np.unique(images[40:, 0, 0], axis=0)) > 30
