import numpy as np
import pytest

from dit.image_sampling import ImageSampler, load_image_sampler
from dit.sampling import sample_latents
from dit.sampling_arguments import add_sampling_arguments
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import InputError
from latent_diffusion.sampling import sample_generators
from latent_diffusion.vae import decode_latents

from ..conftest import DATA, dit_config


@pytest.fixture
def load(tmp_path, golden_json, vae_folder):
    """`load(*flags)` -> what the flags name, by default the EMA weights of the reference's training checkpoint."""
    dit_config(golden_json("config")["mini"]).save(tmp_path / "mini.json")

    def run(*flags: str, device: str = "cpu") -> ImageSampler:
        parser = ArgumentParser()
        add_sampling_arguments(parser, vae=str(vae_folder), cfg_scale=4.0)
        own = ("--model", str(tmp_path / "mini.json"), "--ckpt", str(DATA / "training.pt"), "--sampling-steps", "3")
        return load_image_sampler(parser.parse_args([*own, *flags]), device)

    return run


@pytest.mark.parametrize(("flags", "entry"), [((), "ema"), (("--use-ema", "False"), "model")])
def test_the_averaged_weights_are_taken_unless_told_otherwise(load, make_mini_dit, flags, entry):
    expected = make_mini_dit(entry).state_dict()
    for name, tensor in load(*flags).model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name].numpy())


def test_images_are_the_decoded_latents(load):
    sampler, steps = load("--sampler", "ddim"), []
    images = sampler.draw([3, 4], sample_generators(5, range(2)), lambda: steps.append(1))
    latents = sample_latents(sampler.model, [3, 4], sampler.sampler, 4.0, 5)
    np.testing.assert_array_equal(images, decode_latents(sampler.vae, latents))
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8 and len(steps) == 3


def test_a_sample_is_a_function_of_seed_and_number(load):
    sampler = load("--sampler", "ddim")
    images = sampler.draw_samples(5, range(2, 6))
    generators = sample_generators(5, range(2, 6))
    labels = [int(rng.integers(sampler.model.config.num_classes)) for rng in generators]
    np.testing.assert_array_equal(images, sampler.draw(labels, generators))
    np.testing.assert_array_equal(sampler.draw_samples(5, [5, 4, 3, 2]), images[::-1])
    assert np.any(sampler.draw_samples(6, range(2, 6)) != images)


def test_the_guidance_interval_is_passed_on(load):
    generators = sample_generators(5, range(2))
    unguided = load("--cfg-scale", "1").draw([3, 4], generators)
    generators = sample_generators(5, range(2))
    np.testing.assert_array_equal(load("--guidance-interval", "0.0001", "0.0002").draw([3, 4], generators), unguided)


def test_the_scale_of_the_latents_can_be_given(load):
    assert load().vae.config.scaling_factor == 0.5
    assert load("--sd-scale-factor", "0.25").vae.config.scaling_factor == 0.25


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [("fp32", "gpu", None), ("fp16", "gpu", "float16"), ("bf16", "gpu", "bfloat16"), ("fp16", "cpu", None)],
)
def test_float16_is_for_a_gpu(load, capsys, dtype, device, expected):
    assert load("--dtype", dtype, device=device).amp_dtype == expected
    noted = "note: float16 has no effect on a CPU" in capsys.readouterr().err
    assert noted == (device == "cpu")


def test_weights_of_another_size_are_refused(load):
    with pytest.raises(InputError, match="--image-size 256 contradicts .*training.pt, which is of 64"):
        load("--image-size", "256")


def test_a_vae_of_other_channels_is_refused(load, monkeypatch):
    monkeypatch.setattr("latent_diffusion.vae.load_vae", lambda name: _Vae())
    with pytest.raises(InputError, match="has 8 latent channels, the model 4"):
        load()


def test_a_vae_of_another_downsampling_is_refused(load):
    with pytest.raises(InputError, match="vae_tiny makes latents of 1/2 of the image's side; the model takes 1/8"):
        load("--vae", str(DATA.parent / "vae" / "vae_tiny"))


class _Vae:
    class config:
        latent_channels = 8
