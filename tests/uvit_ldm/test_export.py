"""Exported folders: what is in them, and that their pipelines draw what the training-time sampler draws."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.sampling import draw_noise, sample_generators
from latent_diffusion.text_encoder import TextEncoder, load_tokenizer
from latent_diffusion.vae import decode_latents, encode_moments, load_vae
from latent_diffusion.weights import read_paddle
from tests.conftest import DATA as DIT_DATA
from uvit_ldm.export import PIPELINES, STOCK_PIPELINE, export_pipeline, rescale_latents
from uvit_ldm.modeling import UViT
from uvit_ldm.sampling import make_sampler, sample_latents

PROMPTS = ["the digit three", "a cat"]
STEPS, GUIDANCE = 4, 7.5


@pytest.fixture(scope="module")
def model(make_uvit) -> UViT:
    return make_uvit("uvit_ema")


@pytest.fixture(scope="module")
def exports(model, vae_folder, coco_text_encoder, tmp_path_factory) -> dict[str, Path]:
    """The reference model, exported for each pipeline."""
    root = tmp_path_factory.mktemp("exports")
    for pipeline in PIPELINES:
        assert export_pipeline(model, str(vae_folder), coco_text_encoder, root / pipeline, pipeline) <= 1e-5
    return {pipeline: root / pipeline for pipeline in PIPELINES}


def load_pipeline(folder: Path):
    import ppdiffusers

    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipe = getattr(ppdiffusers, name).from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_pipeline_draws_what_the_sampler_draws(exports, model, vae_folder, coco_text_encoder, pipeline):
    latents = sample_latents(
        model,
        coco_text_encoder.encode(PROMPTS),
        coco_text_encoder.encode([""])[0],
        make_sampler("ddim", STEPS),
        guidance_scale=GUIDANCE,
        seed=5,
    )
    vae = load_vae(str(vae_folder))
    vae.register_to_config(scaling_factor=model.config.scaling_factor)
    expected = decode_latents(vae, latents)
    images = load_pipeline(exports[pipeline])(
        PROMPTS,
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=draw_noise(sample_generators(5, range(2)), model.config.latent_shape),
        output_type="np",
    ).images
    found = (images * 255).round().astype(int)
    assert found.shape == expected.shape == (2, 64, 64, 3)
    assert np.abs(found - expected).max() <= 1 and (found != expected).mean() < 1e-3
    inside = (expected > 0) & (expected < 255)
    assert expected.std() > 10 and inside.mean() > 0.5  # not cut off at black and white


@pytest.mark.parametrize("ratio", [0.2301 / 0.18215, 0.5])
def test_a_vae_of_rescaled_latents_decodes_to_the_same_images(vae_folder, ratio):
    own, rescaled = load_vae(str(vae_folder)), load_vae(str(vae_folder))
    rescale_latents(rescaled, ratio)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    means, log_variances = np.split(encode_moments(own, images), 2, axis=1)
    found_means, found_log_variances = np.split(encode_moments(rescaled, images), 2, axis=1)
    np.testing.assert_allclose(found_means, ratio * means, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.exp(0.5 * found_log_variances), ratio * np.exp(0.5 * log_variances), rtol=1e-4)
    for vae in (own, rescaled):
        vae.register_to_config(scaling_factor=1.0)
    decoded = decode_latents(own, paddle.to_tensor(means)).astype(int)
    np.testing.assert_array_equal(decode_latents(rescaled, paddle.to_tensor(found_means)), decoded)
    assert decoded.std() > 1


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


TREE = {
    "model_index.json",
    "vqvae/config.json",
    "vqvae/model_state.pdparams",
    "{}/model_config.json",
    "{}/model_state.pdparams",
    "unet/config.json",
    "unet/model_state.pdparams",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
}


@pytest.mark.parametrize(("pipeline", "encoder"), PIPELINES.items())
def test_what_a_folder_holds(exports, model, coco_text_encoder, pipeline, encoder):
    folder = exports[pipeline]
    tree = {name.format(encoder) for name in TREE}
    assert files(folder) == tree | {"tokenizer/vocab.json", "tokenizer/merges.txt"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == pipeline
    parts = {name: value[0] for name, value in index.items() if not name.startswith("_")}
    assert parts.keys() == {"vqvae", encoder, "unet", "scheduler", "tokenizer"}
    own = {name for name, library in parts.items() if not library.startswith("ppdiffusers")}
    assert own == (set() if pipeline == STOCK_PIPELINE else {"vqvae", encoder, "unet"})
    config = json.loads((folder / "unet/config.json").read_text())
    assert config["clip_dim"] == 32 and config["num_text_tokens"] == 7 and config["_scaling_factor"] == 0.2301
    scaling_factor = json.loads((folder / "vqvae/config.json").read_text())["scaling_factor"]
    assert scaling_factor == (0.18215 if pipeline == STOCK_PIPELINE else 0.2301)
    assert json.loads((folder / "tokenizer/tokenizer_config.json").read_text())["model_max_length"] == 7
    assert read_paddle(folder / "unet/model_state.pdparams").keys() == model.state_dict().keys()
    again = TextEncoder.load(str(folder / encoder), str(folder / "tokenizer"), 7)
    np.testing.assert_array_equal(again.encode(PROMPTS), coco_text_encoder.encode(PROMPTS))


def test_a_tokenizer_of_bert_is_exported_with_its_vocabulary(model, vae_folder, coco_text_encoder, tmp_path):
    (tmp_path / "bert").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "digit", "three", "a", "cat"]
    (tmp_path / "bert/vocab.txt").write_text("\n".join(words))
    encoder = dataclasses.replace(coco_text_encoder, tokenizer=load_tokenizer(str(tmp_path / "bert"), 7))
    export_pipeline(model, str(vae_folder), encoder, tmp_path / "out", "LDMTextToImagePipeline")
    assert files(tmp_path / "out") == {name.format("bert") for name in TREE} | {"tokenizer/vocab.txt"}
    pipe = load_pipeline(tmp_path / "out")
    assert pipe.tokenizer("a cat", padding="max_length", max_length=7)["input_ids"] == [2, 8, 9, 3, 0, 0, 0]
    assert pipe("a cat", num_inference_steps=1).images[0].size == (64, 64)


def test_the_scaling_factor_is_that_of_the_network(model, vae_folder, coco_text_encoder, tmp_path):
    other = UViT(dataclasses.replace(model.config, scaling_factor=0.99))
    other.eval()
    export_pipeline(other, str(vae_folder), coco_text_encoder, tmp_path / "out", "LDMTextToImagePipeline")
    assert json.loads((tmp_path / "out/vqvae/config.json").read_text())["scaling_factor"] == 0.99


@pytest.mark.parametrize(
    ("width", "length", "pipeline", "message"),
    [
        (16, 7, "LDMTextToImagePipeline", "gives contexts of width 16, the network takes clip_dim 32"),
        (32, 12, "LDMTextToImagePipeline", "--model_max_length 12 contradicts the network's num_text_tokens 7"),
        (32, 78, STOCK_PIPELINE, "takes at most 77 tokens, the network 78; leave out --pipeline"),
    ],
)
def test_a_text_encoder_that_does_not_fit_is_refused(model, vae_folder, tmp_path, width, length, pipeline, message):
    if length == 78:
        model = UViT(dataclasses.replace(model.config, num_text_tokens=78))
    with pytest.raises(InputError, match=message):
        export_pipeline(model, str(vae_folder), SimpleNamespace(width=width, length=length), tmp_path / "out", pipeline)
    assert not list(tmp_path.iterdir())


def test_a_vae_that_does_not_fit_is_refused(model, vae_folder, coco_text_encoder, tmp_path):
    three = UViT(dataclasses.replace(model.config, in_channels=3))
    tiny = str(DIT_DATA.parent / "vae/vae_tiny")
    for network, vae, message in (
        (three, str(vae_folder), "has 4 latent channels, the model 3"),
        (model, tiny, "makes latents of 1/2 of the image's side; the model takes 1/8"),
    ):
        with pytest.raises(InputError, match=message):
            export_pipeline(network, vae, coco_text_encoder, tmp_path / "out", STOCK_PIPELINE)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_replaced(model, vae_folder, coco_text_encoder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"exists and holds no model_index\.json"):
        export_pipeline(model, str(vae_folder), coco_text_encoder, tmp_path, STOCK_PIPELINE)
    assert files(tmp_path) == {"thesis.txt"}


def test_a_failed_export_leaves_the_old_folder(model, vae_folder, coco_text_encoder, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model_index.json").touch()

    def fail(*_arguments):
        raise OSError("disk full")

    monkeypatch.setattr("uvit_ldm.export.write_paddle", fail)
    with pytest.raises(OSError, match="disk full"):
        export_pipeline(model, str(vae_folder), coco_text_encoder, tmp_path / "out", STOCK_PIPELINE)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/model_index.json"]
