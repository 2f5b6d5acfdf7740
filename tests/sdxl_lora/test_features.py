from pathlib import Path

import numpy as np
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.features import TrainingStream
from latent_diffusion.loader import StreamBatchSampler, TrainingLoader
from latent_diffusion.objectives import Objective
from sdxl_lora.dataset import CaptionedImages, open_dataset
from sdxl_lora.features import OnlineFeatures
from sdxl_lora.micro_conditioning import resize_shorter_side

from .captioned import pixels, png, write_parquet


class NothingDrawn(Objective):
    """In place of an objective."""

    def draw(self, rng, shape):
        return {"t": np.int64(rng.integers(1000))}

    def losses(self, denoise, x_start, t, noise): ...


def tokenize(text: str) -> dict[str, np.ndarray]:
    """In place of that of the text encoders: the letters."""
    letters = np.frombuffer(text.encode().ljust(16), np.uint8).astype(np.int64)
    return {"tokens": letters, "tokens_2": -letters}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> CaptionedImages:
    folder = tmp_path_factory.mktemp("images")
    encoded = [png(pixels(i, 100, 70)) for i in range(6)]
    write_parquet(folder / "train.parquet", encoded, [["a", "b", "c"]] * 5 + [["d"]])
    return open_dataset(str(folder), None, None)


@pytest.fixture
def make_features(images):
    def make(center_crop: bool = False, random_flip: bool = False) -> OnlineFeatures:
        return OnlineFeatures(images, tokenize, 4, 64, center_crop, random_flip)

    return make


def test_a_sample_has_all_that_training_takes(make_features):
    sample = make_features().sample(0, np.random.default_rng(0))
    found = {name: (value.shape, value.dtype.name) for name, value in sample.items()}
    assert found == {
        "images": ((64, 64, 3), "uint8"),
        "posterior_noise": ((4, 8, 8), "float32"),
        "time_ids": ((6,), "float32"),
        "tokens": ((16,), "int64"),
        "tokens_2": ((16,), "int64"),
    }


def test_caption_mirror_crop_and_noise_are_drawn_in_this_order(make_features, images):
    features = make_features(random_flip=True)
    mirrored = set()
    for seed in range(8):
        sample, rng = features.sample(1, np.random.default_rng(seed)), np.random.default_rng(seed)
        caption = "abc"[rng.integers(3)]
        is_mirrored = rng.random() < 0.5
        top = int(rng.integers(91 - 64 + 1))
        resized = np.asarray(resize_shorter_side(images.image(1), 64))
        expected = (resized[:, ::-1] if is_mirrored else resized)[top : top + 64]
        np.testing.assert_array_equal(sample["images"], expected)
        np.testing.assert_array_equal(sample["time_ids"], [100, 70, top, 0, 64, 64])
        np.testing.assert_array_equal(sample["posterior_noise"], rng.standard_normal((4, 8, 8), dtype=np.float32))
        np.testing.assert_array_equal(sample["tokens"], tokenize(caption)["tokens"])
        mirrored.add(is_mirrored)
    assert mirrored == {True, False}


def test_nothing_is_drawn_of_what_is_not_asked_for(make_features):
    sample = make_features(center_crop=True).sample(5, np.random.default_rng(0))
    expected = np.random.default_rng(0).standard_normal((4, 8, 8), dtype=np.float32)
    np.testing.assert_array_equal(sample["posterior_noise"], expected)
    np.testing.assert_array_equal(sample["time_ids"], [100, 70, 14, 0, 64, 64])


def test_an_image_that_is_far_too_long_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(pixels(0, 100, 1))], ["a"])
    features = OnlineFeatures(open_dataset(str(tmp_path), None, None), tokenize, 4, 1024, True, False)
    with pytest.raises(InputError, match=rf"cannot read the image in row 0 .* of {tmp_path}: it has 1x100 pixels"):
        features.sample(0, np.random.default_rng(0))


def test_workers_read_the_same_samples(make_features):
    """Forked processes share the rows in memory."""
    stream = TrainingStream(make_features(random_flip=True), NothingDrawn(), seed=0)
    sampler = StreamBatchSampler(batch_size=2, first=0, last=6)
    alone, shared = (list(TrainingLoader(stream, sampler, workers)) for workers in (0, 2))
    assert len(shared) == 6
    for one, other in zip(alone, shared, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name].numpy(), other[name].numpy(), strict=True)


def test_a_worker_that_meets_an_unreadable_image_says_so(tmp_path: Path):
    write_parquet(tmp_path / "train.parquet", [png(pixels(0, 64, 64))[:9000]], ["a"])
    features = OnlineFeatures(open_dataset(str(tmp_path), None, None), tokenize, 4, 64, True, False)
    stream = TrainingStream(features, NothingDrawn(), seed=0)
    with pytest.raises(InputError, match=rf"cannot read the image in row 0 .* of {tmp_path}"):
        list(TrainingLoader(stream, StreamBatchSampler(1, 0, 1), 1))
