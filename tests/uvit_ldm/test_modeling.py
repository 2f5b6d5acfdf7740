import dataclasses
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion.ops import Linear
from latent_diffusion.transformer import sinusoid
from tests import formulations
from tests.conftest import linear_weights
from uvit_ldm.configuration import UViTConfig
from uvit_ldm.modeling import UViT

from .conftest import uvit_config

CONFIGS = {
    "mscoco_uvit_s2": "uvit_t2i_small",
    "mscoco_uvit_s2_deep": "uvit_t2i_small_deep",
    "t2i_uvit_m2_derived": "uvit_t2i_mid",
    "t2i_uvit_l2_derived": "uvit_t2i_large",
    "t2i_uvit_h2_derived": "uvit_t2i_huge",
}

# Absolute tolerances of the reference's own description: the time token carries the rounding of its angles.
OUTPUT, TIME, TOKENS, INNER, SMALL = 3e-5, 1e-4, 5e-4, 2e-5, 1e-5


def close(actual: paddle.Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert tuple(actual.shape) == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance)


@pytest.fixture(params=formulations.ALL)
def formulation(request):
    """The form that the operations take."""
    with formulations.computing_with(request.param):
        yield request.param


def record(model: UViT, *inputs: paddle.Tensor) -> dict[str, tuple[paddle.Tensor, float]]:
    """Runs the model and returns what passes through it, under the names of the reference, with tolerances."""
    seen = {}

    def output(name: str, layer: paddle.nn.Layer, tolerance: float, first_only: bool = False) -> None:
        def hook(layer, args, result):
            seen[name] = (result[:1] if first_only else result, tolerance)

        layer.register_forward_post_hook(hook)

    def input_of(name: str, layer: paddle.nn.Layer, tolerance: float, first_only: bool = False) -> None:
        def hook(layer, args):
            seen[name] = (args[0][:1] if first_only else args[0], tolerance)

        layer.register_forward_pre_hook(hook)

    first, last = model.in_blocks[0], model.out_blocks[0]
    input_of("tokens_in", first, TOKENS)
    input_of("inner.in_blocks.0.attn_heads_joined", first.attn.proj, INNER, first_only=True)
    input_of("inner.out_blocks.0.skip_concat", last.skip_linear, TOKENS, first_only=True)
    input_of("unpatchified", model.final_layer, OUTPUT)
    for name, layer in (("norm1", first.norm1), ("qkv", first.attn.qkv), ("attn", first.attn), ("mlp", first.mlp)):
        output(f"inner.in_blocks.0.{name}", layer, INNER, first_only=True)
    output("inner.out_blocks.0.skip_linear", last.skip_linear, INNER, first_only=True)
    output("patch_tokens", model.patch_embed, INNER)
    output("context_tokens", model.context_embed, INNER)
    for i in range(2):
        output(f"block.in_blocks.{i}", model.in_blocks[i], TOKENS)
        output(f"block.out_blocks.{i}", model.out_blocks[i], TOKENS)
    output("block.mid_block", model.mid_block, TOKENS)
    output("norm_out", model.norm, TOKENS)
    output("decoder_pred_out", model.decoder_pred, TOKENS)
    with paddle.no_grad():
        seen["out_float"] = (model(*inputs), OUTPUT)
    return seen


def test_forward_pass_and_the_outputs_of_all_blocks(uvit, golden, formulation):
    arrays = golden("forward")
    if "fused" in formulation:
        uvit.enable_xformers_memory_efficient_attention()
    seen = record(uvit, *(paddle.to_tensor(arrays[name]) for name in ("x", "timesteps_float", "context")))
    for name, (value, tolerance) in seen.items():
        close(value, arrays[name], tolerance)
    inner = {name for name in arrays if name.startswith(("inner.", "block."))}
    assert inner <= seen.keys()


@pytest.mark.parametrize(
    ("weights", "timesteps", "expected"),
    [("uvit", "timesteps_int", "out_int"), ("uvit_ema", "timesteps_float", "out_float_ema")],
)
def test_whole_timesteps_and_averaged_weights(make_uvit, golden, weights, timesteps, expected):
    arrays = golden("forward")
    with paddle.no_grad():
        out = make_uvit(weights)(*(paddle.to_tensor(arrays[name]) for name in ("x", timesteps, "context")))
    close(out, arrays[expected], OUTPUT)


@pytest.mark.parametrize("kind", ["int", "float"])
def test_time_embedding(golden, kind):
    arrays = golden("forward")
    close(sinusoid(paddle.to_tensor(arrays[f"timesteps_{kind}"]), 64, 32), arrays[f"time_embedding_{kind}"], TIME)


def test_layer_norm_epsilon_shows_on_small_tokens(uvit, golden, formulation):
    arrays = golden("forward")
    with paddle.no_grad():
        close(uvit.in_blocks[0].norm1(paddle.to_tensor(arrays["ln_small_in"])), arrays["ln_small_out"], SMALL)


def test_the_activation_is_the_exact_gelu(uvit, golden):
    arrays = golden("forward")
    mlp, x = uvit.mid_block.mlp, paddle.to_tensor(arrays["gelu_in"])
    mlp.fc1 = mlp.fc2 = Linear(x.shape[-1], x.shape[-1])
    mlp.fc1.weight.set_value(paddle.eye(x.shape[-1]))
    close(mlp(x), arrays["gelu_out"], SMALL)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_sizes(golden_json, name):
    expected = golden_json("models")["models"][name]
    file = Path(f"config/{CONFIGS[name]}.json")
    config = UViTConfig.from_json(file)
    assert config == uvit_config(expected["kwargs"])
    with paddle.LazyGuard():  # shapes alone: the largest has half a billion weights
        model = UViT.__new__(UViT)
        model.initialize_weights = lambda: None
        model.__init__(config)
    transposed = linear_weights(model)
    shapes = {n: list(p.shape)[::-1] if n in transposed else list(p.shape) for n, p in model.named_parameters()}
    assert shapes == dict(expected["parameters"])
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == expected["num_parameters"]


def test_the_middle_block_is_there_once_for_odd_depths(tiny_config):
    model = UViT(dataclasses.replace(tiny_config, num_layers=5))
    assert len(model.in_blocks) == len(model.out_blocks) == 2


def test_recompute_gives_the_same_gradients(make_uvit, golden):
    arrays = golden("forward")
    inputs = [paddle.to_tensor(arrays[name]) for name in ("x", "timesteps_int", "context")]
    gradients = []
    for enabled in (False, True):
        model = make_uvit()
        model.train()
        model.enable_recompute = enabled
        (model(*inputs) ** 2).mean().backward()
        gradients.append({name: p.grad.numpy() for name, p in model.named_parameters()})
    for name, value in gradients[0].items():
        # The gradients of a block's input are summed in another order.
        largest = np.abs(value).max()
        np.testing.assert_allclose(value, gradients[1][name], rtol=0, atol=1e-5 * largest, err_msg=name)


def test_initial_weights(tiny_config):
    paddle.seed(0)
    model = UViT(tiny_config)
    linear = model.in_blocks[0].mlp.fc1
    assert abs(linear.weight.numpy().std() - 0.02) < 1e-3 and not linear.bias.numpy().any()
    assert abs(model.pos_embed.numpy().std() - 0.02) < 2e-3
    bound = (4 * 2 * 2) ** -0.5
    convolution = model.patch_embed.proj
    for values in (convolution.weight.numpy(), convolution.bias.numpy()):
        assert 0.8 * bound < np.abs(values).max() <= bound
    assert (model.in_blocks[0].norm1.weight.numpy() == 1).all()
