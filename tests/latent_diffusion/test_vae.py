import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion import hub
from latent_diffusion.errors import InputError
from latent_diffusion.vae import (
    decode_latents,
    encode_moments,
    full_name,
    load_fitting_vae,
    load_vae,
    load_vae_for_images,
    sample_moments,
    vae_settings,
)
from latent_diffusion.weights import read_torch, write_torch

DATA = Path(__file__).parents[1] / "data" / "vae"


@pytest.fixture
def folder(vae_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(vae_folder, tmp_path / "vae")


def test_a_folder_gives_its_network(vae_folder):
    from ppdiffusers.models.autoencoder_kl import AutoencoderKL

    own, theirs = load_vae(str(vae_folder)), AutoencoderKL.from_pretrained(str(vae_folder))
    assert not own.training
    assert own.config.scaling_factor == theirs.config.scaling_factor == 0.5
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(own.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)


def test_a_vae_of_other_latents_is_refused(vae_folder):
    assert load_fitting_vae(str(vae_folder), 4).config.latent_channels == 4
    with pytest.raises(InputError, match="the VAE .* has 4 latent channels, the model 8"):
        load_fitting_vae(str(vae_folder), 8)
    with pytest.raises(InputError, match="vae_tiny makes latents of 1/2 of the image's side; the model takes 1/8"):
        load_fitting_vae(str(DATA / "vae_tiny"), 4)


def test_the_settings_of_a_vae_change_with_its_weights_and_its_scale(vae_folder):
    vae = load_vae(str(vae_folder))
    before = vae_settings(vae)
    assert vae_settings(load_vae(str(vae_folder))) == before
    vae.register_to_config(scaling_factor=0.25)
    assert vae_settings(vae) == before | {"scaling_factor": 0.25}
    vae.decoder.conv_in.bias.set_value(vae.decoder.conv_in.bias + 1.0)
    assert vae_settings(vae)["vae"] != before["vae"]


def test_safetensors_are_read_too(vae_folder, tmp_path):
    vae = load_vae(str(vae_folder))
    vae.save_pretrained(str(tmp_path / "vae"), safe_serialization=True)
    assert not (tmp_path / "vae" / "model_state.pdparams").exists()
    reloaded = load_vae(str(tmp_path / "vae")).state_dict()
    for name, tensor in vae.state_dict().items():
        np.testing.assert_array_equal(reloaded[name].numpy(), tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("name", ["vae_tiny", "vae_tiny_old_keys", "compvis/autoencoder_kl_tiny.pth"])
def test_a_vae_of_pytorch_computes_what_diffusers_does(name):
    """In safetensors, in a `.bin` with the names of old versions, and in CompVis' layout."""
    vae = load_vae(str(DATA / name))
    with np.load(DATA / "vae.npz") as file:
        expected = {key: paddle.to_tensor(value) for key, value in file.items()}
    with paddle.no_grad():
        posterior = vae.encode(expected["image"]).latent_dist
        found = {
            "moments": paddle.concat([posterior.mean, posterior.logvar], axis=1),
            "decoded": vae.decode(expected["latents"]).sample,
            "mean_rect": vae.encode(expected["image_rect"]).latent_dist.mean,
            "decoded_rect": vae.decode(expected["mean_rect"]).sample,
        }
    for key, value in found.items():
        tolerance = 1e-4 if "decoded" in key else 5e-5
        assert float((value - expected[key]).abs().max()) <= tolerance, key
    sample = sample_moments(found["moments"].numpy(), expected["noise"].numpy())
    assert np.abs(sample - expected["sample"].numpy()).max() <= 5e-5


def test_images_become_latents_and_images_again(vae_folder):
    vae = load_vae(str(vae_folder))
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    moments = encode_moments(vae, images)
    assert moments.shape == (3, 8, 8, 8) and moments.dtype == np.float32
    mean = moments[:, :4]
    latents = paddle.to_tensor(mean * vae.config.scaling_factor)
    decoded = decode_latents(vae, latents)
    assert decoded.shape == (3, 64, 64, 3) and decoded.dtype == np.uint8
    with paddle.no_grad():
        expected = ((vae.decode(paddle.to_tensor(mean)).sample.numpy() + 1) * 127.5).clip(0, 255)
    assert np.abs(decoded - expected.transpose(0, 2, 3, 1)).max() <= 0.51


def test_decoding_in_parts_changes_nothing(vae_folder):
    vae = load_vae(str(vae_folder))
    latents = paddle.to_tensor(np.random.default_rng(0).standard_normal((3, 4, 8, 8), dtype=np.float32))
    whole, parts = decode_latents(vae, latents), decode_latents(vae, latents, batch_size=2)
    assert np.abs(whole.astype(int) - parts).max() <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_no_images(vae_folder, bad):
    latents = np.zeros((3, 4, 8, 8), np.float32)
    latents[2, 0, 0, 0] = bad
    with pytest.raises(InputError, match="the samples are not finite: .* --dtype fp32"):
        decode_latents(load_vae(str(vae_folder)), paddle.to_tensor(latents), batch_size=2)


@pytest.mark.parametrize("missing", ["config.json", "model_state.pdparams"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(InputError, match=rf"the VAE folder .*vae.*{missing}"):
        load_vae(str(folder))


def test_a_broken_config_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        load_vae(str(folder))


def test_weights_of_another_configuration_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))
    with pytest.raises(InputError, match=r"\S+ in .*model_state\.pdparams has shape \[.*\], the model.s has \["):
        load_vae(str(folder))


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the file was executed",)


def test_a_pickle_of_anything_but_weights_is_refused_and_not_executed(folder):
    (folder / "model_state.pdparams").write_bytes(pickle.dumps({"encoder.conv_in.weight": Bomb()}))
    with pytest.raises(InputError, match=r"model_state\.pdparams was refused"):
        load_vae(str(folder))


def test_a_name_on_the_hub_is_downloaded(monkeypatch, vae_folder):
    asked = []
    monkeypatch.setattr(hub, "_download", lambda name, file: asked.append((name, file)) or vae_folder / file)
    assert load_vae("some/model/vae").config.scaling_factor == 0.5
    assert asked == [("some/model/vae", "config.json"), ("some/model/vae", "model_state.pdparams")]


def test_a_name_that_cannot_be_downloaded_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "_download", fail)
    with pytest.raises(InputError, match="the VAE 'some/vae' is neither a folder nor could it be downloaded"):
        load_vae("some/vae")


@pytest.fixture
def compvis(tmp_path):
    """A file in CompVis' layout with its configuration, that a test may spoil."""
    return shutil.copytree(DATA / "compvis", tmp_path / "vae") / "autoencoder_kl_tiny.pth"


def test_the_configuration_of_a_compvis_file_comes_from_its_shapes(compvis):
    (compvis.parent / "config.json").write_text(json.dumps({"norm_num_groups": 8, "scaling_factor": 0.23}))
    vae = load_vae(str(compvis))
    assert not vae.training
    assert vae.config.block_out_channels == [16, 32]
    assert (vae.config.layers_per_block, vae.config.latent_channels, vae.config.norm_num_groups) == (1, 4, 8)
    assert vae.config.scaling_factor == 0.23


def test_a_compvis_file_alone_has_the_groups_and_the_scale_of_stable_diffusion(tmp_path):
    path = tmp_path / "autoencoder_kl.pth"
    write_torch(path, {name: widened(name, value) for name, value in compvis_weights().items()}, {})
    vae = load_vae(str(path))
    assert vae.config.block_out_channels == [32, 64]
    assert (vae.config.norm_num_groups, vae.config.scaling_factor) == (32, 0.18215)


def compvis_weights():
    return read_torch(DATA / "compvis" / "autoencoder_kl_tiny.pth")


def widened(name, value):
    """A weight of the same VAE with twice the channels, but for latents and colors."""
    if name.startswith(("quant_conv", "post_quant_conv")):
        return value
    kept = {"encoder.conv_in": (1,), "encoder.conv_out": (0,), "decoder.conv_in": (1,), "decoder.conv_out": (0,)}
    axes = [axis for axis in range(min(value.ndim, 2)) if axis not in kept.get(name.rpartition(".")[0], ())]
    for axis in axes:
        value = np.repeat(value, 2, axis)
    return value


def test_a_compvis_file_whose_shapes_leave_something_open_is_named(compvis):
    (compvis.parent / "config.json").unlink()
    message = (
        r"autoencoder_kl_tiny\.pth leave its norm_num_groups open, and {} does not divide .*\[16, 32\].*config\.json"
    )
    with pytest.raises(InputError, match=message.format(32)):
        load_vae(str(compvis))
    for bad in (5, 0, -8, "many"):
        (compvis.parent / "config.json").write_text(json.dumps({"norm_num_groups": bad}))
        with pytest.raises(InputError, match=message.format(bad)):
            load_vae(str(compvis))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder.down.0.block.0.conv2.weight", "is no VAE in the layout of CompVis"),
        ("post_quant_conv.weight", "is no VAE in the layout of CompVis"),
        ("decoder.mid.attn_1.q.weight", r"lacks the weight decoder\.mid_block\.attentions\.0\.to_q\.weight"),
    ],
)
def test_a_compvis_file_that_lacks_something_is_named(compvis, name, message):
    weights = compvis_weights()
    del weights[name]
    write_torch(compvis, weights, {})
    with pytest.raises(InputError, match=rf"autoencoder_kl_tiny\.pth {message}"):
        load_vae(str(compvis))


def test_a_file_that_is_not_there_is_never_asked_from_the_hub(monkeypatch):
    monkeypatch.setattr(hub, "_download", pytest.fail)
    with pytest.raises(InputError, match=r"weights/autoencoder_kl\.pth does not exist"):
        load_vae("weights/autoencoder_kl.pth")


def test_a_config_of_something_else_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"down_block_types": ["NoSuchBlock"]}))
    with pytest.raises(InputError, match=r"config\.json does not describe an AutoencoderKL"):
        load_vae(str(folder))
    assert load_vae_for_images(str(folder), (4, 8, 8)) is None


def test_images_are_done_without_a_vae_that_does_not_fit(vae_folder, capsys):
    assert load_vae_for_images(str(vae_folder), (4, 8, 8)) is not None
    assert capsys.readouterr().err == ""
    assert load_vae_for_images(str(vae_folder), (8, 8, 8)) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no images will be logged") and "4 latent channels, the model 8" in line


@pytest.mark.parametrize(
    ("name", "full"), [("mse", "stabilityai/sd-vae-ft-mse"), ("ema", "stabilityai/sd-vae-ft-ema"), ("a/b", "a/b")]
)
def test_short_names_stand_for_the_published_vaes(monkeypatch, vae_folder, name, full):
    asked = []
    monkeypatch.setattr(hub, "_download", lambda name, file: asked.append(name) or vae_folder / file)
    load_vae(name)
    assert set(asked) == {full}


def test_a_folder_has_one_name():
    assert full_name("vaes/mine/") == full_name("vaes/mine") == "vaes/mine"
