import numpy as np
import pytest

from demo.digits import load_folder, write_digit_folders
from demo.judge import Judge, box_average, nearest_train_distance


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digit_folders(root)
    return load_folder(root / "train"), load_folder(root / "val")


def test_held_out_digits_are_read(splits):
    train, val = splits
    judge = Judge().fit(*train)
    assert judge.accuracy(*val) >= 0.97
    assert judge.accuracy(np.zeros_like(val[0]), val[1]) <= 0.2


def test_box_average_keeps_the_place_of_each_box():
    images = np.zeros((1, 16, 16, 3), dtype=np.uint8)
    images[0, 2:4, 6:8] = 255  # row 1, column 3 of the 8x8 grid
    images[0, 0, 0] = 51
    expected = np.zeros((8, 8))
    expected[1, 3] = 1
    expected[0, 0] = 0.2 / 4
    np.testing.assert_allclose(box_average(images), expected.reshape(1, 64))


def test_nearest_distance_is_the_plain_definition(splits):
    (train, _), (val, _) = splits
    train, val = train[::10], val[::10]
    differences = box_average(val)[:, None] - box_average(train)[None]
    expected = np.sqrt((differences**2).sum(axis=2)).min(axis=1).mean()
    assert nearest_train_distance(val, train) == pytest.approx(expected)


def test_copies_are_at_distance_zero(splits):
    (train, _), _ = splits
    assert nearest_train_distance(train[:50], train) == pytest.approx(0, abs=1e-6)
