import paddle
import pytest
from ppdiffusers.models.lora import LoRALinearLayer

from sdxl_lora.layers import LoRALayer


@pytest.fixture
def layer() -> LoRALayer:
    layer = LoRALayer(6, 5, rank=2, dtype="float32")
    paddle.nn.initializer.Normal()(layer.up.weight)
    return layer


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_computes_what_the_layer_of_ppdiffusers_does_in_the_type_of_the_input(layer, dtype):
    x = paddle.randn([3, 4, 6]).astype(dtype)
    found, expected = layer(x), LoRALinearLayer.forward(layer, x)
    assert found.dtype == expected.dtype == x.dtype
    assert (found == expected).all()


def test_what_has_the_type_of_the_weights_is_not_copied(layer, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a cast copies")

    monkeypatch.setattr(paddle.Tensor, "cast", refuse)
    with pytest.raises(AssertionError, match="copies"):
        LoRALinearLayer.forward(layer, paddle.randn([4, 6]))
    assert layer(paddle.randn([4, 6])).shape == [4, 5]
