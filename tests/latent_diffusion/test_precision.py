import paddle
import pytest

from latent_diffusion import ops, precision
from latent_diffusion.native import library


@pytest.fixture(params=[True, False])
def cpu_has_bfloat16(request, monkeypatch):
    monkeypatch.setattr(library, "has_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_a_gpu_has_all(dtype):
    assert precision.choose(dtype, "gpu") == (dtype, None)


def test_a_cpu_has_bfloat16_where_its_instructions_and_the_kernels_are(cpu_has_bfloat16):
    assert precision.choose(None, "cpu") == (None, None)
    dtype, note = precision.choose("bfloat16", "cpu")
    assert dtype == ("bfloat16" if cpu_has_bfloat16 else None)
    assert (note is None) == cpu_has_bfloat16
    if note:
        assert "python -m latent_diffusion.native" in note


def test_a_cpu_has_no_float16(cpu_has_bfloat16):
    assert precision.choose("float16", "cpu") == (None, "float16 has no effect on a CPU; computing in float32")


@pytest.mark.skipif(not library.has_bfloat16(), reason="this processor does not multiply bfloat16")
def test_the_context_of_a_cpu_rounds_the_products_of_linear_layers():
    layer, x = ops.Linear(64, 64), paddle.randn([8, 64])
    expected = layer(x)
    with precision.autocast(None):
        assert (layer(x) == expected).all()
    with precision.autocast("bfloat16"):
        difference = (layer(x) - expected).abs().max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_context_of_a_gpu_is_that_of_paddle(monkeypatch, dtype):
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    seen = []
    monkeypatch.setattr(paddle.amp, "auto_cast", lambda **keys: seen.append(keys))
    precision.autocast(dtype)
    assert seen == [{"level": "O1", "dtype": dtype}]
