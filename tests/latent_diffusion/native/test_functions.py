import os
import subprocess
import sys

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from latent_diffusion import attention, ops, precision
from latent_diffusion.native import functions, library
from tests.cli.commands import REPOSITORY
from tests.formulations import computing_with

pytestmark = pytest.mark.skipif(functions.load() is None, reason="the kernels are not built")

# Groups, tokens and width: of a real network; less than one block of columns; more rows and columns than whole blocks.
SHAPES = [(2, 64, 128), (3, 1, 5), (2, 65, 67), (1, 200, 130)]


def draw(*shape: int, seed: int = 0) -> paddle.Tensor:
    values = np.random.default_rng(seed + sum(shape)).standard_normal(shape, dtype=np.float32)
    return paddle.to_tensor(values, stop_gradient=False)


def with_gradients(function, *inputs: paddle.Tensor) -> list[np.ndarray]:
    """What `function` gives, and its gradients by all inputs for a random gradient of the result."""
    out = function(*inputs)
    return [out.numpy(), *(g.numpy() for g in paddle.grad(out, inputs, draw(*out.shape, seed=9).astype(out.dtype)))]


def assert_close(actual: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 2e-6) -> None:
    """Each within `tolerance` of its largest value."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max(), err_msg=f"result {i}")


def compare(function, *inputs: paddle.Tensor) -> None:
    """The kernels and Paddle's plain operations agree on `function` of the inputs, and on its gradients."""
    actual = with_gradients(function, *inputs)
    with computing_with("GPU formulations"):
        expected = with_gradients(function, *inputs)
    assert_close(actual, expected)


@pytest.mark.parametrize(("groups", "tokens", "width"), SHAPES)
def test_modulated_layer_norm(groups, tokens, width):
    x = draw(groups, tokens, width) * 3 + 2
    compare(ops.modulated_layer_norm, x, draw(groups, width, seed=1), draw(groups, width, seed=2))


@pytest.mark.parametrize(("groups", "tokens", "width"), SHAPES)
def test_layer_norm_with_one_gain_for_all(groups, tokens, width):
    layer = ops.LayerNorm(width)
    layer.weight.set_value(draw(width, seed=1))
    layer.bias.set_value(draw(width, seed=2))
    compare(lambda x, *_: layer(x), draw(groups, tokens, width), layer.weight, layer.bias)


@pytest.mark.parametrize(("groups", "tokens", "width"), SHAPES)
def test_gated_sum(groups, tokens, width):
    x, y = draw(groups, tokens, width), draw(groups, tokens, width, seed=1)
    compare(ops.gated_sum, x, draw(groups, width, seed=2), y)


@pytest.mark.parametrize("approximate", [True, False])
def test_gelu_before_a_linear_layer(approximate):
    layer = ops.Linear(7, 9)
    x = paddle.concat([paddle.linspace(-30, 30, 697), paddle.to_tensor([0.0, -1e-8, 1e4])]).reshape([2, 50, 7])
    x.stop_gradient = False
    inputs = [x, layer.weight, layer.bias]
    actual = with_gradients(lambda x, *_: ops.gelu_linear(x, layer, approximate), *inputs)
    # Paddle's own gradient of the tanh form loses digits in float32 where tanh is almost 1.
    double = [paddle.to_tensor(tensor.numpy().astype(np.float64), stop_gradient=False) for tensor in inputs]
    assert_close(actual, with_gradients(lambda x, *linear: F.linear(F.gelu(x, approximate), *linear), *double))


@pytest.mark.parametrize("approximate", [True, False])
def test_gelu_of_large_values(approximate):
    layer, x = ops.Linear(1, 1), paddle.to_tensor([[30.0], [1e4], [-30.0], [-1e4], [1e30], [-1e30]])
    layer.weight.set_value(paddle.ones([1, 1]))
    x.stop_gradient = False
    out = ops.gelu_linear(x, layer, approximate)
    out.sum().backward()
    np.testing.assert_allclose(out.numpy(), [[30.0], [1e4], [0.0], [0.0], [1e30], [0.0]], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), [[1.0], [1.0], [0.0], [0.0], [1.0], [0.0]], atol=1e-6)


FUNCTIONS = {
    "linear": (functions.linear, [(4, 5), (5, 3), (3,)]),
    "gelu_linear": (lambda *inputs: functions.gelu_linear(*inputs, True), [(4, 5), (5, 3), (3,)]),
    "layer_norm": (lambda *inputs: functions.layer_norm(*inputs, 1e-6), [(2, 4, 5), (2, 5), (2, 5)]),
    "gated_sum": (functions.gated_sum, [(2, 4, 5), (2, 5), (2, 4, 5)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("frozen", range(3))
def test_an_input_that_needs_no_gradient_changes_nothing_for_the_others(name, frozen):
    function, shapes = FUNCTIONS[name]
    inputs = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected = with_gradients(function, *inputs)
    inputs[frozen].stop_gradient = True
    others = [tensor for i, tensor in enumerate(inputs) if i != frozen]
    out = function(*inputs)
    found = [out, *paddle.grad(out, others, draw(*out.shape, seed=9))]
    del expected[1 + frozen]
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "at", "shape"),
    [
        ("linear", 1, (6, 3)),
        ("linear", 2, (4,)),
        ("gelu_linear", 1, (4, 3)),
        ("layer_norm", 1, (1, 5)),
        ("layer_norm", 1, (2, 4)),
        ("layer_norm", 2, (5,)),
        ("gated_sum", 1, (3, 5)),
        ("gated_sum", 2, (2, 3, 5)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, at, shape):
    function, shapes = FUNCTIONS[name]
    shapes = [*shapes[:at], shape, *shapes[at + 1 :]]
    with pytest.raises(ValueError, match="do not fit each other"):
        function(*(draw(*each) for each in shapes))


def test_other_misfits_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        ops.lerp_(draw(4).detach(), draw(5).detach(), 0.5)
    with pytest.raises(ValueError, match="not queries, keys and values of 2 heads"):
        functions.attention(draw(1, 2, 9), 2)
    with pytest.raises(ValueError, match="float32 in host memory, not paddle.float16"):
        functions.lerp_(draw(4).detach(), draw(4).detach().astype("float16"), 0.5)


def test_an_empty_batch_gives_an_empty_batch():
    for function, shapes in FUNCTIONS.values():
        inputs = [draw(*shape) for shape in shapes]
        empty = [tensor[:0] if tensor.shape[0] == inputs[0].shape[0] else tensor for tensor in inputs]
        assert function(*empty).shape[0] == 0


def test_the_default_type_of_paddle_does_not_matter():
    x, layer = draw(4, 5), ops.Linear(5, 3)
    expected = with_gradients(lambda x, *_: layer(x), x, layer.weight, layer.bias)
    paddle.set_default_dtype("float64")
    try:
        found = with_gradients(lambda x, *_: layer(x), x, layer.weight, layer.bias)
    finally:
        paddle.set_default_dtype("float32")
    assert all(np.array_equal(a, b) and a.dtype == np.float32 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "tokens", "width"), SHAPES)
def test_linear(groups, tokens, width, bias):
    layer = ops.Linear(width, 33, bias_attr=None if bias else False)
    parameters = [layer.weight, *([layer.bias] if bias else [])]
    compare(lambda x, *_: layer(x), draw(groups, tokens, width), *parameters)


def test_a_linear_layer_on_data_needs_no_gradient_of_it():
    layer, x = ops.Linear(5, 3), draw(4, 5).detach()
    layer(x).sum().backward()
    np.testing.assert_allclose(layer.weight.grad.numpy(), np.tile(x.numpy().sum(0)[:, None], 3), rtol=1e-6)


@pytest.mark.parametrize(("batch", "tokens", "heads", "head_dim"), [(3, 16, 4, 16), (2, 77, 3, 8), (1, 1, 1, 4)])
def test_attention(batch, tokens, heads, head_dim):
    qkv = draw(batch, tokens, 3 * heads * head_dim)
    actual = with_gradients(lambda x: functions.attention(x, heads), qkv)
    assert_close(actual, with_gradients(lambda x: attention._plain(x, heads), qkv))


def test_attention_of_large_scores_stays_finite():
    out, gradient = with_gradients(lambda x: functions.attention(x, 1), draw(1, 8, 12) * 100)
    assert np.isfinite(out).all() and np.isfinite(gradient).all()


def test_the_average_moves_by_the_weight():
    average, value = draw(1000).detach(), draw(1000, seed=1).detach()
    expected = average.numpy() + 0.25 * (value.numpy() - average.numpy())
    ops.lerp_(average, value, 0.25)
    np.testing.assert_allclose(average.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.gelu_linear(x, ops.Linear(6, 6), True),
        lambda x: ops.gelu_linear(x, ops.Linear(6, 6), False),
        lambda x: ops.modulated_layer_norm(x, x[:, 0] * 0, x[:, 0] * 0),
        lambda x: functions.attention(x, 1),
        lambda x: functions.gated_sum(x, x[:, 0], x),
        lambda x: ops.Linear(6, 6)(x),
        lambda x: functions._product(x[0], x[0], transpose_b=True),
    ],
)
def test_values_that_are_not_finite_are_not_hidden(function):
    x = draw(1, 3, 6).detach()
    x[0, 1, 2] = float("nan")
    assert not np.isfinite(function(x).numpy()).all()


def test_the_number_of_threads_changes_no_bit():
    kernels, before = functions.load(), functions.load().threads()
    x, y, gate, shift = draw(2, 130, 96), draw(2, 130, 96, seed=1), draw(2, 96, seed=2), draw(2, 96, seed=3)

    def compute() -> list[np.ndarray]:
        norm = with_gradients(ops.modulated_layer_norm, x, shift, gate)
        return norm + with_gradients(lambda x: functions.attention(x, 2), x) + with_gradients(ops.gated_sum, x, gate, y)

    results = []
    try:
        for threads in (1, 2, 3):
            kernels.omp_set_num_threads(threads)
            assert kernels.threads() == threads
            results.append(compute())
    finally:
        kernels.omp_set_num_threads(before)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_views_are_taken_as_what_they_show():
    code = """
import numpy as np, paddle
from latent_diffusion import ops
average = paddle.zeros([6, 4])
view = (paddle.arange(24, dtype="float32").reshape([4, 6]) / 9).t()
assert not view.is_contiguous()
ops.lerp_(average, view, 1.0)
print(np.abs(average.numpy() - view.numpy()).max())
"""
    environment = os.environ | {"FLAGS_use_stride_kernel": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert float(done.stdout) < 1e-6, done.stderr


def test_half_precision_and_static_programs_are_left_to_paddle():
    assert functions.covers(draw(2)) and not functions.covers(draw(2).astype("bfloat16"))
    paddle.enable_static()
    try:
        assert not functions.covers(paddle.static.data("x", [2], "float32"))
    finally:
        paddle.disable_static()


# bfloat16

multiplies_bfloat16 = pytest.mark.skipif(not library.has_bfloat16(), reason="this processor does not multiply bfloat16")


def test_rounding_to_bfloat16_is_that_of_paddle():
    x = paddle.concat([draw(10000).detach(), paddle.to_tensor([0.0, float("inf"), 1.00390625, 1.01171875, 3.4e38])])
    np.testing.assert_array_equal(functions._rounded(x, True).astype("float32"), x.astype("bfloat16").astype("float32"))


@multiplies_bfloat16
def test_bfloat16_rounds_what_is_multiplied_and_nothing_else():
    layer, x = ops.Linear(96, 33), draw(40, 96)
    layer.bias.set_value(draw(33, seed=1))

    def rounded(t: paddle.Tensor) -> paddle.Tensor:
        return t.astype("bfloat16").astype("float32")

    with precision.autocast("bfloat16"):
        out, dx, dweight, dbias = with_gradients(lambda x, *_: layer(x), x, layer.weight, layer.bias)
    dout = draw(40, 33, seed=9)
    assert_close(
        [out, dx, dweight, dbias],
        [
            (paddle.matmul(rounded(x), rounded(layer.weight)) + layer.bias).numpy(),
            paddle.matmul(rounded(dout), rounded(layer.weight), transpose_y=True).numpy(),
            paddle.matmul(rounded(x), rounded(dout), transpose_x=True).numpy(),
            dout.sum(0).numpy(),
        ],
    )


@multiplies_bfloat16
def test_bfloat16_ends_with_its_context():
    layer, x = ops.Linear(8, 8), draw(4, 8)
    expected = layer(x).numpy()
    with pytest.raises(RuntimeError), precision.autocast("bfloat16"):
        assert not np.array_equal(layer(x).numpy(), expected)
        raise RuntimeError
    np.testing.assert_array_equal(layer(x).numpy(), expected)
