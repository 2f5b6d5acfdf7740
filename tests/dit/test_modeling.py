import math
import os
import subprocess
import sys

import numpy as np
import paddle
import pytest

from dit.configuration import DiTConfig
from dit.modeling import DiT, DiTBlock, sincos_positions
from latent_diffusion import attention, precision
from latent_diffusion.native.library import has_bfloat16
from latent_diffusion.transformer import sinusoid
from tests import formulations

# Largest absolute differences that a float32 implementation should meet: four times those of the reference to its
# own float64 run.
TOLERANCES = {
    "out": 1e-4,
    "out_cfg": 2e-4,
    "patch_tokens": 5e-6,
    "tokens_in": 5e-6,
    "t_freq": 5e-4,
    "t_emb": 1e-4,
    "y_emb": 1e-6,
    "c": 1e-4,
    "block_0_attn": 5e-5,
    "block_0_mlp": 5e-5,
    "block_0": 1e-4,
    "block_1": 1e-4,
    "block_2": 1e-4,
    "final_tokens": 1e-4,
    "block_0_small_out": 2e-5,
}
MINI_TOLERANCE = 2e-5


def close(actual: paddle.Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert tuple(actual.shape) == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance)


def inputs(arrays: dict[str, np.ndarray], suffix: str = "") -> list[paddle.Tensor]:
    return [paddle.to_tensor(arrays[name + suffix]) for name in ("x", "t", "y")]


@pytest.fixture(params=formulations.ALL)
def formulation(request):
    """The form that the operations take."""
    with formulations.computing_with(request.param):
        yield request.param


def record(model: DiT, arrays: dict[str, np.ndarray]) -> dict[str, paddle.Tensor]:
    """Runs the model on `arrays` and returns what passes through it, under the names of the reference."""
    seen = {}

    def keep(name):
        def hook(layer, args, result):
            seen[name] = result

        return hook

    def keep_inputs(layer, args):
        seen["tokens_in"], seen["c"] = args

    layers = {
        "patch_tokens": model.x_embedder,
        "t_emb": model.t_embedder,
        "y_emb": model.y_embedder,
        "block_0_attn": model.blocks[0].attn,
        "block_0_mlp": model.blocks[0].mlp,
        "final_tokens": model.final_layer,
        **{f"block_{i}": block for i, block in enumerate(model.blocks)},
    }
    for name, layer in layers.items():
        layer.register_forward_post_hook(keep(name))
    model.blocks[0].register_forward_pre_hook(keep_inputs)
    with paddle.no_grad():
        seen["out"] = model(*inputs(arrays))
        seen["t_freq"] = sinusoid(paddle.to_tensor(arrays["t"]), 256, 128)
    return seen


def test_forward_pass_and_intermediate_values(dit, golden, formulation):
    arrays = golden("forward")
    if "fused" in formulation:
        dit.enable_xformers_memory_efficient_attention()
    seen = record(dit, arrays)
    for name, value in seen.items():
        close(value, arrays[name], TOLERANCES[name])
    assert seen.keys() == TOLERANCES.keys() - {"out_cfg", "block_0_small_out"}


def test_timestep_zero_is_exact_to_rounding(dit, golden):
    arrays = golden("forward")
    with paddle.no_grad():
        out = dit(*inputs(arrays))
    assert arrays["t"][0] == 0
    close(out[:1], arrays["out"][:1], 5e-6)


@pytest.mark.parametrize("name", ["LATENT_DIFFUSION_TUNING=off", "FLAGS_use_stride_kernel=1"])
def test_forward_pass_and_gradients_with_other_settings(name):
    key, value = name.split("=")
    tests = ["-k", "intermediate_values or all_formulations"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, *tests], env=os.environ | {key: value}, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode()


def test_layer_norm_epsilon_and_gelu_show_on_small_tokens(dit, golden, formulation):
    arrays = golden("forward")
    tokens, c = paddle.to_tensor(arrays["block_0_small_in"]), paddle.to_tensor(arrays["c_small"])
    with paddle.no_grad():
        close(dit.blocks[0](tokens, c), arrays["block_0_small_out"], TOLERANCES["block_0_small_out"])


def test_guidance_of_three_channels(dit, golden):
    arrays = golden("forward")
    x, t, y = inputs(arrays, "_cfg")
    with paddle.no_grad():
        out = dit.forward_with_cfg(x, t, y, 4.0)
        close(out, arrays["out_cfg"], TOLERANCES["out_cfg"])
        x[3:] = 0.0  # the second half is not read
        close(dit.forward_with_cfg(x, t, y, 4.0), out.numpy(), 0)


@pytest.mark.parametrize(("entry", "expected"), [("model", "mini_out_model"), ("ema", "mini_out_ema")])
def test_a_checkpoint_of_the_training_script(make_mini_dit, golden, entry, expected):
    arrays = golden("forward")
    with paddle.no_grad():
        close(make_mini_dit(entry)(*inputs(arrays)), arrays[expected], MINI_TOLERANCE)


def test_timestep_convention_of_ppdiffusers(make_dit, make_mini_dit, golden):
    arrays, expected = golden("forward"), golden("forward_time127")
    model = make_dit("ppdiffusers")
    with paddle.no_grad():
        close(model(*inputs(arrays)), expected["out"], TOLERANCES["out"])
        guided = model.forward_with_cfg(*inputs(arrays, "_cfg"), 4.0)
        close(guided, expected["out_cfg"], TOLERANCES["out_cfg"])
        mini = make_mini_dit("ema", "ppdiffusers")
        close(mini(*inputs(arrays)), expected["mini_out_ema"], MINI_TOLERANCE)


def test_the_last_row_of_the_label_table_is_the_null_class(dit, golden):
    """The model drops no label itself: a dropped label (`y_dropped` of the reference) is that of the null class."""
    arrays = golden("forward")
    x, t, y = inputs(arrays)
    null = dit.config.num_classes
    dropped = np.where(arrays["force_drop_ids"] == 1, null, arrays["y"])
    np.testing.assert_array_equal(dropped, arrays["y_dropped"])
    with paddle.no_grad():
        table = dit.y_embedder.embedding_table.weight
        close(dit.y_embedder(paddle.to_tensor([null])), table[-1:].numpy(), 0)
        assert table.shape[0] == null + 1
        out = dit(x, t, y).numpy()
        out_dropped = dit(x, t, paddle.to_tensor(arrays["y_dropped"])).numpy()
        dit.train()
        close(dit(x, t, y), out, 0)
    changed = (arrays["y"] != dropped).tolist()
    assert any(changed) and not all(changed)
    assert [bool(np.any(a != b)) for a, b in zip(out, out_dropped, strict=True)] == changed


def test_float_timesteps_are_taken(dit, golden):
    x, t, y = inputs(golden("forward"))
    with paddle.no_grad():
        close(dit(x, t.astype("float32"), y), dit(x, t, y).numpy(), 0)
        assert np.abs((dit(x, t.astype("float32") + 0.5, y) - dit(x, t, y)).numpy()).max() > 1e-3


@pytest.mark.parametrize("index", range(13))
def test_names_shapes_and_counts_of_the_published_models(golden_json, index):
    expected = golden_json("models")[index]
    with paddle.LazyGuard():  # DiT-XL/2 would take 2.7 GB
        model = DiT(DiTConfig.from_name(expected["name"], expected["image_size"]))
    named = dict(model.named_parameters())
    linear = {f"{n}.weight" for n, layer in model.named_sublayers() if isinstance(layer, paddle.nn.Linear)}
    shapes = [[n, list(p.shape)[::-1] if n in linear else list(p.shape)] for n, p in named.items()]
    assert shapes == expected["params"]
    assert sum(math.prod(p.shape) for p in named.values()) == expected["num_parameters"]
    trainable = sum(math.prod(p.shape) for p in named.values() if not p.stop_gradient)
    assert trainable == expected["num_trainable"]


# Initialization


@pytest.fixture(scope="module")
def fresh() -> DiT:
    paddle.seed(0)
    return DiT(DiTConfig(16, 2, 4, 2, 4, 32, num_classes=50))


def test_gates_and_output_start_at_zero(fresh):
    modulations = [block.adaLN_modulation for block in fresh.blocks] + [fresh.final_layer.adaLN_modulation]
    for layer in [modulation[1] for modulation in modulations] + [fresh.final_layer.linear]:
        assert not layer.weight.numpy().any() and not layer.bias.numpy().any()
    with paddle.no_grad():
        x, t, y = paddle.randn([2, 4, 16, 16]), paddle.to_tensor([0, 999]), paddle.to_tensor([0, 50])
        assert not fresh(x, t, y).numpy().any()


def assert_xavier_uniform(weight: np.ndarray, fan_in: int, fan_out: int) -> None:
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert 0.98 * bound < np.abs(weight).max() <= bound
    assert abs(weight.mean()) < 0.05 * bound
    assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_linear_layers_start_as_xavier(fresh, name):
    for block in fresh.blocks:
        layer = dict(block.named_sublayers())[name]
        assert_xavier_uniform(layer.weight.numpy(), *layer.weight.shape)
        assert not layer.bias.numpy().any()


def test_the_patch_embedding_starts_as_a_linear_layer(fresh):
    """Xavier over the values of a patch, not over the fans of a convolution."""
    proj = fresh.x_embedder.proj
    assert_xavier_uniform(proj.weight.numpy(), fan_in=4 * 2 * 2, fan_out=128)
    assert not proj.bias.numpy().any()


def test_tables_start_with_a_deviation_of_two_percent(fresh):
    layers = [fresh.y_embedder.embedding_table, fresh.t_embedder.mlp[0], fresh.t_embedder.mlp[2]]
    for layer in layers:
        values = layer.weight.numpy()
        assert values.std() == pytest.approx(0.02, rel=0.05) and abs(values.mean()) < 2e-3
    assert not fresh.t_embedder.mlp[0].bias.numpy().any() and not fresh.t_embedder.mlp[2].bias.numpy().any()


def test_sincos_positions(official_weights, fresh):
    positions = sincos_positions(64, 4)
    assert positions.dtype == np.float32
    np.testing.assert_allclose(positions, official_weights["pos_embed"], rtol=0, atol=1e-7)
    np.testing.assert_array_equal(fresh.pos_embed.numpy(), sincos_positions(128, 8))
    assert fresh.pos_embed.stop_gradient


# What must change nothing


def gradients(model: DiT, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    model.train()
    (model(*inputs(arrays)) ** 2).mean().backward()
    found = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return found


def test_recompute_gives_the_same_gradients(dit, golden, monkeypatch):
    arrays = golden("forward")
    expected = gradients(dit, arrays)
    passes = []
    original = DiTBlock.forward
    monkeypatch.setattr(DiTBlock, "forward", lambda *args: passes.append(1) or original(*args))
    dit.enable_recompute = True
    actual = gradients(dit, arrays)
    assert len(passes) == 2 * len(dit.blocks) - 1  # not the last one
    assert actual.keys() == expected.keys() and len(actual) == 41
    for name, value in actual.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.skipif(not has_bfloat16(), reason="this processor does not multiply bfloat16")
def test_recompute_in_bfloat16_gives_the_same_gradients(dit, golden):
    arrays, found = golden("forward"), []
    for dit.enable_recompute in (False, True):
        dit.train()
        with precision.autocast("bfloat16"):
            loss = (dit(*inputs(arrays)) ** 2).mean()
        loss.backward()  # outside the context, as training does
        found.append({n: p.grad.numpy() for n, p in dit.named_parameters() if p.grad is not None})
        dit.clear_gradients()
    for name, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][name], err_msg=name)


@pytest.mark.parametrize("name", ["CPU formulations", "GPU formulations"])
def test_all_formulations_have_the_same_gradients(dit, golden, name):
    arrays = golden("forward")
    expected = gradients(dit, arrays)
    with formulations.computing_with(name):
        actual = gradients(dit, arrays)
    for name, value in actual.items():
        # The gradient of key biases is zero up to rounding.
        np.testing.assert_allclose(
            value, expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max(), err_msg=name
        )


def test_memory_efficient_attention_on_a_cpu_warns_and_changes_nothing(dit, golden, capsys):
    arrays = golden("forward")
    with paddle.no_grad():
        expected = dit(*inputs(arrays)).numpy()
        dit.enable_xformers_memory_efficient_attention()
        close(dit(*inputs(arrays)), expected, 0)
    if not paddle.device.is_compiled_with_cuda():
        assert capsys.readouterr().err.count("no effect on a CPU") == 1


@pytest.mark.parametrize(("batch", "tokens", "heads", "head_dim"), [(3, 16, 4, 16), (2, 7, 3, 8), (1, 1, 1, 4)])
def test_attention_formulations_agree(batch, tokens, heads, head_dim):
    rng = np.random.default_rng(0)
    qkv = paddle.to_tensor(rng.standard_normal((batch, tokens, 3 * heads * head_dim), dtype=np.float32))
    q, k, v = np.moveaxis(qkv.numpy().astype(np.float64).reshape(batch, tokens, 3, heads, head_dim), 2, 0)
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(head_dim)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhnm,bmhd->bnhd", weights, v).reshape(batch, tokens, -1)
    for formulation in (attention._batched_products, attention._plain, attention._fused):
        close(formulation(qkv, heads), expected, 2e-6)
