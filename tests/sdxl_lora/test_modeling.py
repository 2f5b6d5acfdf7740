"""The trained network: its parameters, its states, recompute."""

import numpy as np
import paddle
import pytest

from latent_diffusion.checkpoint import set_weights, write_weights
from latent_diffusion.ema import EMA
from latent_diffusion.transformer import NEEDS_GPU
from sdxl_lora.configuration import LoRAConfig
from sdxl_lora.lora import read_lora
from sdxl_lora.modeling import SDXLLoRA
from sdxl_lora.pretrained import load_unet
from tests.data.sdxl_lora.formula import RANK, batch


@pytest.fixture
def model(make_lora_model) -> SDXLLoRA:
    return make_lora_model(train_text_encoder=True)


def inputs(*names: str) -> dict[str, paddle.Tensor]:
    values = {name: paddle.to_tensor(value) for name, value in batch().items()}
    return {"x": values["noise"]} | {name: values[name] for name in ("t", "time_ids", *names)}


def gradients(model: SDXLLoRA) -> dict[str, np.ndarray]:
    model(**inputs("tokens", "tokens_2")).square().mean().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def test_parameters_and_states_are_those_of_lora_alone(model):
    names = [name for name, _ in model.named_parameters()]
    assert names == list(model.state_dict())
    assert all(".lora." in name or ".lora_linear_layer." in name for name in names)
    assert {p.dtype for p in model.parameters()} == {paddle.float32}
    assert model.config == LoRAConfig(RANK, train_text_encoder=True)


def test_the_networks_are_frozen_but_for_lora(model):
    lora = {p.name for p in model.parameters()}
    for network in (model.unet, *model.text_encoders.models):
        assert all(p.stop_gradient for p in network.parameters() if p.name not in lora)


def test_every_trained_weight_gets_a_gradient(model):
    trained = {name for name, p in model.named_parameters() if not p.stop_gradient}
    assert gradients(model).keys() == trained


def test_the_last_layer_of_the_first_text_encoder_is_not_trained(model):
    frozen = {name for name, p in model.named_parameters() if p.stop_gradient}
    assert len(frozen) == 8
    assert all(name.startswith("text_encoder.text_model.encoder.layers.1.self_attn.") for name in frozen)


def test_states_are_restored(make_lora_model, diffusers_pipeline, tmp_path):
    model, other = make_lora_model(), SDXLLoRA(load_unet(str(diffusers_pipeline)), RANK)
    conditions = {"contexts": paddle.randn([2, 16, 64]), "pooled": paddle.randn([2, 32])}
    expected = model(**inputs(), **conditions)
    assert np.abs((other(**inputs(), **conditions) - expected).numpy()).max() > 0.1
    set_weights(other, {name: value.numpy() for name, value in model.state_dict().items()}, tmp_path)
    np.testing.assert_array_equal(other(**inputs(), **conditions), expected)


def test_recompute_changes_no_gradient(make_lora_model, monkeypatch):
    calls = []
    recompute = paddle.distributed.fleet.utils.recompute
    monkeypatch.setattr(
        "ppdiffusers.models.unet_2d_blocks.recompute", lambda *a, **k: calls.append(a) or recompute(*a, **k)
    )
    plain, saving = make_lora_model(train_text_encoder=True), make_lora_model(train_text_encoder=True)
    assert not plain.enable_recompute
    saving.enable_recompute = True
    assert saving.enable_recompute
    expected = gradients(plain)
    assert not calls
    found = gradients(saving)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max())
    assert len(calls) == 7  # every residual block but the first of the middle, which the UNet computes once
    saving.enable_recompute = False
    assert not saving.enable_recompute


def test_memory_efficient_attention_is_noted_on_a_cpu(model, capsys):
    model.enable_xformers_memory_efficient_attention()
    assert capsys.readouterr().err == f"note: {NEEDS_GPU}\n"


def test_weights_for_other_programs_are_beside_those_of_a_checkpoint(make_lora_model, tmp_path):
    model = make_lora_model()
    ema = EMA(model)
    with paddle.no_grad():
        for parameter in model.parameters():
            parameter.set_value(parameter + 1)
    for folder, average in ((tmp_path / "raw", None), (tmp_path / "averaged", ema)):
        folder.mkdir()
        write_weights(folder, model, average)
        for name, value in (average or model).state_dict().items():
            np.testing.assert_array_equal(read_lora(folder)[name], value.numpy())
