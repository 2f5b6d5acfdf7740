import dataclasses

import numpy as np
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.sampling import sample_generators
from latent_diffusion.vae import decode_latents, load_vae
from uvit_ldm.features import open_features
from uvit_ldm.image_sampling import ImageSampler, load_networks
from uvit_ldm.sampling import make_sampler, sample_latents

from ..conftest import DATA as DIT_DATA
from .conftest import DATA


@pytest.fixture
def sampler(uvit, vae_folder) -> ImageSampler:
    captions = open_features(DATA / "coco_features_tiny", uvit.config, "val")
    return ImageSampler(uvit, load_vae(str(vae_folder)), make_sampler("ddim", 3), 2.0, captions=captions)


def test_images_are_the_decoded_latents(sampler, golden):
    contexts, steps = golden("sampling")["context"], []
    images = sampler.draw(contexts, sample_generators(5, range(2)), lambda: steps.append(1))
    empty = sampler.captions.empty_context
    latents = sample_latents(sampler.model, contexts, empty, sampler.sampler, 2.0, 5)
    np.testing.assert_array_equal(images, decode_latents(sampler.vae, latents))
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8 and len(steps) == 3


def test_a_sample_is_a_function_of_seed_and_number(sampler):
    images = sampler.draw_samples(5, range(2, 6))
    np.testing.assert_array_equal(sampler.draw_samples(5, [5, 4, 3, 2]), images[::-1])
    assert len({image.tobytes() for image in images}) == 4
    assert np.any(sampler.draw_samples(6, range(2, 6)) != images)


def test_samples_are_of_the_captions_in_turn(sampler, monkeypatch):
    """Of each image one of its captions; with more samples than images it begins anew."""
    drawn = []
    monkeypatch.setattr(ImageSampler, "draw", lambda self, contexts, generators: drawn.extend(contexts))
    sampler.draw_samples(0, range(40))
    folder = DATA / "coco_features_tiny/val"
    captions = [{np.load(path).tobytes() for path in folder.glob(f"{image}_*.npy")} for image in (0, 1)]
    assert [{context.tobytes() for context in drawn[image::2]} for image in (0, 1)] == captions


def test_the_guidance_interval_is_passed_on(sampler):
    unguided = dataclasses.replace(sampler, guidance_scale=1.0).draw_samples(0, [0])
    found = dataclasses.replace(sampler, guidance_interval=(0.0001, 0.0002)).draw_samples(0, [0])
    np.testing.assert_array_equal(found, unguided)
    assert np.any(sampler.draw_samples(0, [0]) != unguided)


def test_networks_are_loaded_with_the_scale_of_the_latents(official_files, tiny_config, vae_folder, tmp_path):
    tiny_config.save(tmp_path / "config.json")
    model, vae = load_networks(official_files["uvit"], str(vae_folder), tmp_path / "config.json")
    assert not model.training and vae.config.scaling_factor == tiny_config.scaling_factor == 0.2301
    with pytest.raises(InputError, match="vae_tiny makes latents of 1/2 of the image's side; the model takes 1/8"):
        load_networks(official_files["uvit"], str(DIT_DATA.parent / "vae/vae_tiny"), tmp_path / "config.json")
