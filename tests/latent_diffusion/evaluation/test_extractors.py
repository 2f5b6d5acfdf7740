from pathlib import Path

import numpy as np
import pytest

from demo.digits import load_folder, write_digit_folders
from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.digits_classifier import DigitsClassifier, split_digits
from latent_diffusion.evaluation.extractors import EXTRACTORS, make_extractor
from latent_diffusion.evaluation.pixels import Pixels, grid_average

from .conftest import random_images


def test_averages_over_whole_boxes_are_means():
    images = random_images(3, size=24)
    expected = images.reshape(3, 8, 3, 8, 3, 3).mean(axis=(2, 4))
    assert np.allclose(grid_average(images), expected)


def test_sides_that_are_no_multiple_of_eight_are_averaged_too():
    images = np.full((1, 13, 21, 3), 7, np.uint8)
    assert np.array_equal(grid_average(images), np.full((1, 8, 8, 3), 7.0))
    images[0, -1, -1] = 255
    assert (grid_average(images)[0] > 7).any(axis=-1).sum() == 1


def test_small_images_are_refused():
    with pytest.raises(InputError, match="images of 8x7 pixels are too small"):
        grid_average(np.zeros((1, 7, 8, 3), np.uint8))


def test_pixels_are_in_the_unit_interval():
    images = np.stack([np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)])
    features = Pixels()(images)["features"]
    assert features.dtype == np.float32
    assert features.shape == (2, Pixels.widths["features"])
    assert np.array_equal(features, np.stack([np.zeros(192), np.ones(192)]))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    write_digit_folders(root)
    return root


def test_the_digits_classifier_reads_digits_it_has_not_seen(digits):
    images, labels = load_folder(digits / "val")
    outputs = DigitsClassifier()(images)
    assert (outputs["logits"].argmax(axis=1) == labels).mean() > 0.95
    assert {name: values.shape[1] for name, values in outputs.items()} == DigitsClassifier.widths


def test_the_digits_classifier_is_the_same_every_time(digits):
    images, _ = load_folder(digits / "val")
    first, again = DigitsClassifier()(images[:9]), DigitsClassifier()(images[:9])
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_held_out_digits_are_not_trained_on():
    train, held_out = split_digits()
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 1797


def test_extractors_are_made_by_name(tmp_path):
    assert [make_extractor(name).name for name in EXTRACTORS[2:]] == ["pixels", "digits-classifier"]
    with pytest.raises(InputError, match="unknown extractor 'vgg'; known are inception, dinov2, pixels"):
        make_extractor("vgg")
    with pytest.raises(InputError, match="the extractor pixels has no weights; leave out a.pth"):
        make_extractor("pixels", Path("a.pth"))
