import numpy as np
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.sampling import sample_generators
from latent_diffusion.vae import load_vae
from uvit_ldm.export import export_pipeline
from uvit_ldm.image_sampling import ImageSampler, load_networks
from uvit_ldm.pretrained import other_parts
from uvit_ldm.prompts import Prompts, load_encoder
from uvit_ldm.sampling import make_sampler

TEXTS = ["the cat", "the digit 3", ""]


@pytest.fixture
def prompts(coco_text_encoder) -> Prompts:
    return Prompts(TEXTS, coco_text_encoder)


def test_prompts_are_encoded_and_nothing_is_drawn(prompts, coco_text_encoder):
    (rng,), (fresh,) = sample_generators(5, [0]), sample_generators(5, [0])
    np.testing.assert_array_equal(prompts.draw_contexts([1], [rng]), coco_text_encoder.encode(["the digit 3"]))
    assert rng.standard_normal() == fresh.standard_normal()
    np.testing.assert_array_equal(prompts.empty_context, coco_text_encoder.encode([""])[0])


def test_samples_beyond_the_prompts_begin_anew(prompts, uvit, vae_folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(ImageSampler, "draw", lambda self, contexts, generators: drawn.extend(contexts))
    ImageSampler(uvit, load_vae(str(vae_folder)), make_sampler("ddim", 2), 2.0, captions=prompts).draw_samples(
        0, range(5)
    )
    np.testing.assert_array_equal(drawn[3:], drawn[:2])
    assert prompts.of_samples(5) == ["the cat", "the digit 3", "", "the cat", "the digit 3"]


def test_settings_change_with_the_prompts_alone(prompts, coco_text_encoder):
    own, others = prompts.settings(), Prompts(["the cat", "the digit", "3"], coco_text_encoder).settings()
    assert own == Prompts(list(TEXTS), coco_text_encoder).settings()
    assert [key for key in own if own[key] != others[key]] == ["prompts"]


def test_an_encoder_of_another_width_is_refused(clip_folder, tiny_config):
    with pytest.raises(InputError, match="gives contexts of width 16, the model takes 32"):
        load_encoder(str(clip_folder), str(clip_folder), tiny_config)


@pytest.mark.parametrize("pipeline", ["LDMTextToImagePipeline", "LDMTextToImageUViTPipeline"])
def test_a_pipeline_folder_brings_all_that_it_draws_with(uvit, vae_folder, coco_text_encoder, tmp_path, pipeline):
    """The VAE of the second one was made for latents of another scale."""
    source = tmp_path / "exported"
    export_pipeline(uvit, str(vae_folder), coco_text_encoder, source, pipeline)
    vae_name, encoder_name, tokenizer_name = other_parts(source)
    encoder = load_encoder(encoder_name, tokenizer_name, uvit.config)
    model, vae = load_networks(source, vae_name)
    plain = load_vae(str(vae_folder))
    plain.register_to_config(scaling_factor=uvit.config.scaling_factor)
    way = make_sampler("ddim", 2)
    found = ImageSampler(model, vae, way, 2.0, captions=Prompts(TEXTS, encoder)).draw_samples(0, range(3))
    expected = ImageSampler(uvit, plain, way, 2.0, captions=Prompts(TEXTS, coco_text_encoder)).draw_samples(0, range(3))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_parts_of_other_weights_are_those_of_stable_diffusion(tmp_path):
    vae, *others = other_parts(tmp_path)
    assert vae == "runwayml/stable-diffusion-v1-5/vae" and len(set(others)) == 2
