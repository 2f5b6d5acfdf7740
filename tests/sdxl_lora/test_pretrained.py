"""Parts of pipelines in every layout, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.weights import read_safetensors, write_paddle, write_safetensors, write_torch
from sdxl_lora.objective import Prediction
from sdxl_lora.pretrained import check_conditions, freeze, load_noise_schedule, load_scheduler, load_unet
from tests.conftest import linear_weights
from tests.data.sdxl_lora.formula import SCHEDULER, weight

TORCH_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(diffusers_pipeline, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(diffusers_pipeline, tmp_path / "pipeline")


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_formula(unet) -> None:
    """Its weights are those of `formula.py`."""
    transposed = linear_weights(unet)
    for name, value in unet.state_dict().items():
        expected = weight(f"unet.{name}", tuple(value.shape[::-1] if name in transposed else value.shape))
        np.testing.assert_array_equal(value, expected.T if name in transposed else expected)


def test_a_unet_of_diffusers_is_read(diffusers_pipeline):
    unet = load_unet(f"{diffusers_pipeline}/")
    assert_formula(unet)
    assert not unet.training and all(p.stop_gradient for p in unet.parameters())


def test_a_unet_of_ppdiffusers_is_read(tiny_pipeline):
    unet = load_unet(str(tiny_pipeline))
    expected = read_safetensors(tiny_pipeline / "unet/diffusion_paddle_model.safetensors")
    assert unet.state_dict().keys() == expected.keys()
    for name, value in unet.state_dict().items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "model_state.pdparams"],
)
def test_every_format_of_weights_is_read(folder, name):
    weights = read_safetensors(folder / TORCH_FILE)
    if name.endswith(".pdparams"):
        write_paddle(folder / "unet" / name, load_unet(str(folder)).state_dict())
    elif name.endswith(".bin"):
        write_torch(folder / "unet" / name, weights, {})
    else:
        write_safetensors(folder / "unet" / name, weights)
    (folder / TORCH_FILE).unlink()
    assert_formula(load_unet(str(folder)))


def test_full_precision_comes_before_half(folder):
    write_safetensors(folder / "unet/diffusion_pytorch_model.fp16.safetensors", {"junk": np.zeros(1)})
    assert_formula(load_unet(str(folder)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_get_the_type_that_is_asked_for(diffusers_pipeline, dtype):
    unet = load_unet(str(diffusers_pipeline), dtype)
    assert {p.dtype for p in unet.parameters()} == {getattr(paddle, dtype)}
    found = unet.conv_in.weight.astype("float32").numpy()
    np.testing.assert_allclose(found, weight("unet.conv_in.weight", found.shape), rtol=0.01)


def test_half_precision_in_a_file_becomes_full(folder):
    from safetensors.numpy import save_file

    halves = {name: value.astype(np.float16) for name, value in read_safetensors(folder / TORCH_FILE).items()}
    save_file(halves, folder / TORCH_FILE)
    assert {p.dtype for p in load_unet(str(folder)).parameters()} == {paddle.float32}


def test_keys_of_newer_configurations_are_passed_over(folder):
    change_json(folder / "unet/config.json", dropout=0.0, reverse_transformer_layers_per_block=None, some_new_key=7)
    assert_formula(load_unet(str(folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": None}, "describes no UNet of Stable Diffusion XL: its addition_embed_type is None"),
        ({"layers_per_block": 2}, r"lacks the weight .*: it belongs to another model"),
        ({"cross_attention_dim": 48}, r"shape \[64, 64\], the model's has \[48, 64\]"),
        ({"block_out_channels": None}, "does not describe a UNet2DConditionModel: .*NoneType"),
        ({"block_out_channels": [32, 1 << 40]}, "does not describe a UNet2DConditionModel: .* do not belong together"),
        ({"transformer_layers_per_block": [1, 1 << 40]}, "the configuration is of 1.1e.12 layers"),
        ({"layers_per_block": [1, [1 << 40]]}, "the configuration is of 1.1e.12 layers"),
        ({"cross_attention_dim": 1 << 30}, r"shape \[64, 64\], the model's has \[1073741824, 64\]"),
    ],
)
def test_a_configuration_of_something_else_is_refused(folder, changes, message):
    change_json(folder / "unet/config.json", **changes)
    with pytest.raises(InputError, match=message):
        load_unet(str(folder))


def test_missing_parts_are_named(folder):
    (folder / TORCH_FILE).unlink()
    with pytest.raises(InputError, match=r"the UNet folder .*/unet holds no model_state\.pdparams or "):
        load_unet(str(folder))
    shutil.rmtree(folder / "unet")
    with pytest.raises(InputError, match=r"/pipeline holds no folder unet: it is no pipeline"):
        load_unet(str(folder))


def test_conditions_of_other_widths_are_refused(diffusers_pipeline):
    unet = load_unet(str(diffusers_pipeline))
    check_conditions(unet.config, 64, 32)
    with pytest.raises(InputError, match="give contexts of width 96, the UNet takes 64"):
        check_conditions(unet.config, 96, 32)
    with pytest.raises(InputError, match="takes 80 values of sizes and pooled text, which are 88 .* no refiner"):
        check_conditions(unet.config, 64, 40)


def test_frozen_layer_norms_pass_the_gradients_of_trained_ones():
    x = paddle.randn([2, 3, 8])
    norm = paddle.nn.LayerNorm(8)
    norm.weight.set_value(1 + paddle.arange(8, dtype="float32"))
    found = {}
    for frozen in (False, True):
        if frozen:
            freeze(norm)
        leaf = x.detach()
        leaf.stop_gradient = False
        (norm(leaf) * paddle.cos(x)).sum().backward()
        found[frozen] = leaf.grad.numpy()
    assert all(p.stop_gradient for p in norm.parameters()) and not norm.training
    np.testing.assert_allclose(found[True], found[False], rtol=0, atol=1e-5)


def test_the_noise_of_training_is_read(diffusers_pipeline):
    schedule, prediction = load_noise_schedule(str(diffusers_pipeline))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-6)
    assert schedule.betas.dtype == np.float64 and prediction is Prediction.EPSILON


def test_a_pipeline_that_predicts_velocity_says_so(folder):
    change_json(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert load_noise_schedule(str(folder))[1] is Prediction.VELOCITY


def test_the_prediction_that_is_asked_for_wins(folder):
    change_json(folder / "scheduler/scheduler_config.json", prediction_type="sample")
    assert load_noise_schedule(str(folder), "v_prediction")[1] is Prediction.VELOCITY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "sample"}, "has prediction_type 'sample'; known are epsilon and v_prediction"),
        ({"num_train_timesteps": 10**9}, "has num_train_timesteps 1000000000, which must be from 1 to 100000"),
        ({"num_train_timesteps": "1000"}, "has num_train_timesteps '1000'"),
        ({"beta_schedule": "steep"}, "does not describe a DDPMScheduler: steep"),
        ({"beta_start": "low"}, "does not describe a DDPMScheduler"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(folder, changes, message):
    change_json(folder / "scheduler/scheduler_config.json", **changes)
    with pytest.raises(InputError, match=message):
        load_noise_schedule(str(folder))


def test_a_pipeline_draws_with_the_scheduler_that_it_names(folder):
    from ppdiffusers import DDIMScheduler, EulerDiscreteScheduler

    scheduler = load_scheduler(str(folder))
    assert type(scheduler) is EulerDiscreteScheduler
    assert scheduler.config.timestep_spacing == SCHEDULER["timestep_spacing"]
    change_json(folder / "scheduler/scheduler_config.json", _class_name="DDIMScheduler")
    assert type(load_scheduler(str(folder))) is DDIMScheduler


@pytest.mark.parametrize("name", ["FlowScheduler", "UNet2DConditionModel", "logging", "SchedulerMixin.config", None, 7])
def test_a_class_that_is_no_scheduler_is_refused(folder, name):
    change_json(folder / "scheduler/scheduler_config.json", _class_name=name)
    with pytest.raises(InputError, match=rf"names the class {name!r}, which is no scheduler of ppdiffusers"):
        load_scheduler(str(folder))
