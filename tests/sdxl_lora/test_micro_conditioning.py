"""Expected values are from torchvision's documentation and diffusers' script, computed by hand."""

import numpy as np
import pytest
from PIL import Image

from sdxl_lora.micro_conditioning import (
    center_position,
    crop,
    make_time_ids,
    mirror,
    random_position,
    resize_shorter_side,
)

from .captioned import pixels


def image(width: int, height: int) -> Image.Image:
    return Image.fromarray(pixels(0, height, width))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 70), (91, 64)),  # 64 * 100 / 70 = 91.4
        ((70, 100), (64, 91)),
        ((71, 90), (64, 81)),  # 81.1
        ((90, 100), (64, 71)),  # 71.1
        ((99, 64), (99, 64)),
        ((10, 20), (64, 128)),
        ((33, 33), (64, 64)),
        ((3, 5), (64, 106)),  # 106.7: cut off, not rounded
    ],
)
def test_the_shorter_side_is_brought_to_the_resolution(size, expected):
    assert resize_shorter_side(image(*size), 64).size == expected


def test_resizing_is_bilinear():
    original = image(100, 70)
    expected = np.asarray(original.resize((91, 64), Image.BILINEAR))
    np.testing.assert_array_equal(np.asarray(resize_shorter_side(original, 64)), expected)


def test_an_image_far_longer_than_wide_is_refused():
    """A file of few bytes would take all memory."""
    with pytest.raises(ValueError, match="it has 1x100 pixels, which become 1024x102400, more than the 89478485"):
        resize_shorter_side(image(1, 100), 1024)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (0, 0)),
        ((91, 64), (0, 14)),  # 13.5 is rounded to even
        ((89, 64), (0, 12)),  # 12.5, too
        ((64, 81), (8, 0)),  # 8.5
        ((64, 74), (5, 0)),
    ],
)
def test_the_position_of_the_center(size, expected):
    assert center_position(image(*size), 64) == expected


def test_random_positions_are_top_then_left_and_reach_all_borders():
    draws = np.random.default_rng(3)
    assert random_position(image(70, 67), 64, np.random.default_rng(3)) == (draws.integers(4), draws.integers(7))
    found = {random_position(image(66, 67), 64, np.random.default_rng(seed)) for seed in range(300)}
    assert found == {(top, left) for top in range(4) for left in range(3)}


def test_nothing_is_drawn_where_there_is_one_position():
    rng = np.random.default_rng(0)
    assert random_position(image(64, 64), 64, rng) == (0, 0)
    assert rng.random() == np.random.default_rng(0).random()


def test_a_crop_begins_at_top_and_left():
    original = image(70, 67)
    np.testing.assert_array_equal(crop(original, (3, 5), 60), pixels(0, 67, 70)[3:63, 5:65])
    np.testing.assert_array_equal(np.asarray(mirror(original)), pixels(0, 67, 70)[:, ::-1])


def test_time_ids_are_the_size_as_read_the_crop_and_the_target():
    found = make_time_ids(image(100, 70), (3, 14), 64)
    np.testing.assert_array_equal(found, np.array([70, 100, 3, 14, 64, 64], np.float32), strict=True)
