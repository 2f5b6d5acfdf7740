import math

import numpy as np
import paddle
import pytest
from ppdiffusers import AutoencoderKL

from demo.autoencoder import train_autoencoder
from demo.digits import load_folder, write_digit_folders
from latent_diffusion.errors import InputError
from latent_diffusion.vae import decode_latents, encode_moments


def reconstruct(model: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    mean = encode_moments(model, images)[:, :4]
    return decode_latents(model, paddle.to_tensor(mean) * model.config.scaling_factor)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digit_folders(root)
    return load_folder(root / "val")[0][::20]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("work") / "autoencoder"
    return train_autoencoder(images, output_dir, steps=2), output_dir


def test_ppdiffusers_reloads_the_same_network(trained, images):
    model, output_dir = trained
    reloaded = AutoencoderKL.from_pretrained(str(output_dir))
    reloaded.eval()
    np.testing.assert_array_equal(reconstruct(reloaded, images), reconstruct(model, images))
    assert (output_dir / "model_state.pdparams").exists()
    assert [path.name for path in output_dir.parent.iterdir()] == ["autoencoder"]


def test_scaled_latents_have_unit_deviation(trained, images):
    model, _ = trained
    pixels = paddle.to_tensor(images.transpose(0, 3, 1, 2).astype("float32") / 127.5 - 1)
    with paddle.no_grad():
        latents = model.encode(pixels).latent_dist.sample() * model.config.scaling_factor
    assert latents.shape == [len(images), 4, 8, 8]
    assert math.isfinite(model.config.scaling_factor)
    assert latents.std().item() == pytest.approx(1, abs=0.05)


def test_training_changes_the_weights_and_replaces_the_folder(trained, images):
    model, output_dir = trained
    (output_dir / "stale").touch()
    longer = train_autoencoder(images, output_dir, steps=3)
    assert not np.array_equal(longer.decoder.conv_out.weight.numpy(), model.decoder.conv_out.weight.numpy())
    assert not (output_dir / "stale").exists()


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 64, 64, 3)), np.zeros((0, 64, 64, 3), np.uint8)]
)
def test_other_images_are_refused(bad, tmp_path):
    with pytest.raises(InputError, match="uint8"):
        train_autoencoder(bad, tmp_path / "autoencoder", steps=2)
