import numpy as np
import paddle
import pytest

from demo.autoencoder import build_autoencoder
from demo.digits import IMAGE_SIZE
from demo.sdxl_base import train_base
from sdxl_lora.objective import Prediction
from sdxl_lora.pretrained import load_noise_schedule, load_unet
from sdxl_lora.text_encoders import TextEncoders


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Pipelines after one step of training and after two."""
    root = tmp_path_factory.mktemp("sdxl_base")
    images = np.random.default_rng(0).integers(256, size=(10, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    paddle.seed(0)
    vae = build_autoencoder()
    for steps in (1, 2):
        train_base(images, np.arange(10), vae, root / str(steps), steps)
    return root / "1", root / "2"


def test_the_unet_is_trained_and_nothing_else(bases):
    one, two = (load_unet(str(base)).state_dict() for base in bases)
    assert all(paddle.isfinite(value).all() for value in two.values())
    assert not all(np.array_equal(value.numpy(), two[name].numpy()) for name, value in one.items())
    first, second = (TextEncoders.load(str(base)).models[0].state_dict() for base in bases)
    assert all(np.array_equal(value.numpy(), second[name].numpy()) for name, value in first.items())


def test_the_scheduler_says_that_velocity_is_predicted(bases):
    assert load_noise_schedule(str(bases[0]))[1] is Prediction.VELOCITY


def test_each_color_is_a_word_of_its_own(bases):
    encoders = TextEncoders.load(str(bases[0]))
    red, blue = (encoders.tokenize(f"a {color} three")["tokens"] for color in ("red", "blue"))
    assert (red != blue).sum() == 1
