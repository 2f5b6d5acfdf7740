import os

import numpy as np
import pytest

from demo.digits import load_folder, write_digit_folders
from latent_diffusion.errors import InputError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digit_folders(root)
    return root


def test_every_digit_is_in_exactly_one_split(root):
    train, val = ({path.stem for path in (root / split).rglob("*.png")} for split in ("train", "val"))
    assert len(train | val) == 1797
    assert not train & val
    assert [path.name for path in sorted((root / "train").iterdir())] == [str(digit) for digit in range(10)]


def test_the_held_out_fifth_is_stratified(root):
    _, train = load_folder(root / "train")
    _, val = load_folder(root / "val")
    shares = np.bincount(val) / (np.bincount(train) + np.bincount(val))
    np.testing.assert_allclose(shares, 0.2, atol=0.01)


def test_images_are_white_on_black_rgb(root):
    images, labels = load_folder(root / "val")
    assert images.shape == (len(labels), 64, 64, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert images.max() == 255
    assert images.mean() < 128
    assert (images[..., :1] == images).all()


def test_running_again_writes_only_what_is_missing(root):
    kept, lost = sorted((root / "train" / "3").glob("*.png"))[:2]
    content = lost.read_bytes()
    os.utime(kept, (0, 0))
    lost.unlink()
    write_digit_folders(root)
    assert kept.stat().st_mtime == 0
    assert lost.read_bytes() == content


def test_a_folder_without_digits_is_named(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        load_folder(tmp_path)
