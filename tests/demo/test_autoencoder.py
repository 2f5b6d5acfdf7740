import math
from dataclasses import replace

import numpy as np
import paddle
import pytest
from ppdiffusers import AutoencoderKL

from demo import autoencoder
from demo.autoencoder import COLORED, WHITE, Recipe, build_autoencoder, train_autoencoder
from demo.digits import load_folder, write_digit_folders
from latent_diffusion.errors import InputError
from latent_diffusion.vae import decode_latents, encode_moments, to_pixels


def brief(recipe: Recipe, steps: int) -> Recipe:
    """The recipe, with so few steps of each stage."""
    return replace(recipe, stages=tuple(replace(stage, steps=steps) for stage in recipe.stages))


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
    return train_autoencoder(images, output_dir, brief(WHITE, 2)), output_dir


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
    longer = train_autoencoder(images, output_dir, brief(WHITE, 3))
    assert not np.array_equal(longer.decoder.conv_out.weight.numpy(), model.decoder.conv_out.weight.numpy())
    assert not (output_dir / "stale").exists()


def test_an_autoencoder_of_colors_is_trained_on_parts_of_images_first(images, tmp_path, monkeypatch):
    sides = []
    monkeypatch.setattr(autoencoder, "to_pixels", lambda parts: sides.append(parts.shape[1:3]) or to_pixels(parts))
    model = train_autoencoder(images, tmp_path / "autoencoder", brief(COLORED, 1))
    assert sides == [(32, 32), (64, 64)]
    assert reconstruct(model, images).shape == images.shape


def test_an_autoencoder_of_colors_passes_them_on_from_the_start():
    first = build_autoencoder(COLORED).encoder.conv_in.weight[:3, :, 1, 1].numpy()
    assert (np.diag(first) > np.abs(first - np.diag(np.diag(first))).max()).all()


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 64, 64, 3)), np.zeros((0, 64, 64, 3), np.uint8)]
)
def test_other_images_are_refused(bad, tmp_path):
    with pytest.raises(InputError, match="uint8"):
        train_autoencoder(bad, tmp_path / "autoencoder", brief(WHITE, 2))
