"""The classes that an exported folder names."""

import dataclasses

import numpy as np
import paddle
import pytest

from latent_diffusion.attention import Attention
from uvit_ldm import pipeline
from uvit_ldm.export import export_pipeline
from uvit_ldm.modeling import UViT
from uvit_ldm.pipeline import UViTT2IModel
from uvit_ldm.pretrained import read_pretrained

OUTPUT = 3e-5


@pytest.fixture(scope="module")
def folder(make_uvit, vae_folder, coco_text_encoder, tmp_path_factory):
    """The reference model with a scaling factor of its own, exported."""
    target, reference = tmp_path_factory.mktemp("pipeline") / "out", make_uvit()
    model = UViT(dataclasses.replace(reference.config, scaling_factor=0.5))
    model.set_state_dict(reference.state_dict())
    export_pipeline(model, str(vae_folder), coco_text_encoder, target, "LDMTextToImagePipeline")
    return target


@pytest.fixture
def unet(folder) -> UViTT2IModel:
    return UViTT2IModel.from_pretrained(str(folder / "unet"))


@pytest.fixture
def pipe(folder):
    from ppdiffusers import LDMTextToImagePipeline

    pipe = LDMTextToImagePipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def inputs(golden) -> list[paddle.Tensor]:
    arrays = golden("forward")
    return [paddle.to_tensor(arrays[name]) for name in ("x", "timesteps_float", "context")]


def predict(unet, inputs) -> np.ndarray:
    with paddle.no_grad():
        return unet(*inputs).sample.numpy()


def draw(pipe) -> np.ndarray:
    paddle.seed(0)
    return pipe("the cat", num_inference_steps=2, guidance_scale=7.5, output_type="np").images


def test_names_and_outputs_are_those_of_the_official_network(unet, inputs, golden, official_weights):
    assert unet.state_dict().keys() == official_weights["uvit"].keys()
    assert not unet.training
    assert np.abs(predict(unet, inputs) - golden("forward")["out_float"]).max() <= OUTPUT


def test_it_is_called_as_the_pipelines_call_it(unet, inputs):
    x, _, context = inputs
    expected = predict(unet, [x, paddle.full([len(x)], 981, "int64"), context])
    with paddle.no_grad():
        found = (
            unet(x, paddle.to_tensor(981), encoder_hidden_states=context).sample,
            unet(x, 981, context, return_dict=True).sample,
            unet(x, paddle.to_tensor([981]), context, return_dict=False)[0],
        )
    for value in found:
        np.testing.assert_array_equal(value.numpy(), expected)


def test_it_is_saved_and_read_as_a_model_of_ppdiffusers(unet, inputs, tiny_config, tmp_path):
    for folder, safe in (("safe", True), ("pdparams", False)):
        unet.save_pretrained(str(tmp_path / folder), safe_serialization=safe)
        again = UViTT2IModel.from_pretrained(str(tmp_path / folder))
        np.testing.assert_array_equal(predict(again, inputs), predict(unet, inputs))
        assert read_pretrained(tmp_path / folder).config == dataclasses.replace(tiny_config, scaling_factor=0.5)


def test_setting_weights_reaches_the_network(unet, inputs, golden, make_uvit):
    unet.set_state_dict(make_uvit("uvit_ema").state_dict())
    assert np.abs(predict(unet, inputs) - golden("forward")["out_float_ema"]).max() <= OUTPUT


def test_another_precision_reaches_the_network(unet, inputs, golden):
    unet.to(dtype="float64")
    assert {parameter.dtype for parameter in unet.parameters()} == {paddle.float64}
    found = predict(unet, inputs)
    assert found.dtype == np.float64
    assert np.abs(found - golden("forward")["out_float"]).max() <= OUTPUT


def test_its_mode_reaches_the_network(unet):
    for training in (True, False):
        unet.train() if training else unet.eval()
        assert unet._network.training is unet._network.mid_block.training is training


def test_memory_efficient_attention_has_no_effect_on_a_cpu_and_says_so_once(pipe, capsys):
    pipeline._note.cache_clear()
    before = draw(pipe)
    pipe.enable_xformers_memory_efficient_attention()
    pipe.unet.enable_xformers_memory_efficient_attention()
    np.testing.assert_array_equal(draw(pipe), before)
    pipe.disable_xformers_memory_efficient_attention()
    assert capsys.readouterr().err.count("has no effect on a CPU") == 1


def test_the_switch_of_memory_efficient_attention_reaches_every_block(tiny_config):
    arguments = tiny_config.to_dict()
    del arguments["scaling_factor"]
    unet = UViTT2IModel(**arguments)
    layers = [layer for layer in unet.sublayers() if isinstance(layer, Attention)]
    assert len(layers) == 5
    for enabled in (True, False):
        getattr(unet, f"{'enable' if enabled else 'disable'}_xformers_memory_efficient_attention")()
        assert {layer.memory_efficient for layer in layers} == {enabled}


@pytest.mark.parametrize("dtype", [paddle.float16, "float16", paddle.bfloat16])
def test_half_precision_on_a_cpu_is_float32_and_says_so_once(folder, capsys, dtype):
    from ppdiffusers import LDMTextToImagePipeline

    pipeline._note.cache_clear()
    pipe = LDMTextToImagePipeline.from_pretrained(str(folder), paddle_dtype=dtype)
    for part in (pipe.unet, pipe.bert, pipe.vqvae):
        assert {parameter.dtype for parameter in part.parameters()} == {paddle.float32}
    assert capsys.readouterr().err.count("the pipeline computes in float32 on a CPU") == 1


@pytest.mark.parametrize("part", ["pipe", "unet"])
def test_token_merging_is_switched_on_and_off(pipe, part):
    target = pipe if part == "pipe" else pipe.unet
    before = draw(pipe)
    target.apply_tome(ratio=0.5)
    merged = draw(pipe)
    assert np.abs(merged - before).max() > 1e-3
    target.remove_tome()
    np.testing.assert_array_equal(draw(pipe), before)
    target.apply_tome(ratio=0.0)
    np.testing.assert_array_equal(draw(pipe), before)


def test_half_precision_loads_where_kernels_that_draw_have_none(folder, monkeypatch):
    """As on a GPU, where the dtype is not dropped."""
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    loaded = UViTT2IModel.from_pretrained(str(folder / "unet"), paddle_dtype=paddle.float16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {paddle.float16}
