import numpy as np
import paddle
import pytest

from dit.export import to_ppdiffusers
from latent_diffusion.token_merging import apply_tome, remove_tome


@pytest.fixture
def inputs(golden):
    """An even batch, so that random tokens are drawn."""
    arrays = golden("forward")
    return [paddle.to_tensor(arrays[name][:2]) for name in "xty"]


def predict(network, inputs) -> np.ndarray:
    paddle.seed(0)
    with paddle.no_grad():
        return network(*inputs).numpy()


@pytest.mark.parametrize("convention", ["ppdiffusers", "official"])
@pytest.mark.parametrize("arguments", [{"use_rand": False}, {"use_rand": True}, {"merge_mlp": True}, {"ratio": 0.25}])
def test_an_exported_transformer_merges_as_the_network_does(convention, arguments, make_dit, inputs):
    """In the stock class, and in that of `--exact`."""
    model = make_dit(convention)
    transformer = to_ppdiffusers(model, exact=convention == "official")
    before = predict(model, inputs)

    def exported(x, t, y):
        return transformer(x, timestep=t, class_labels=y).sample

    apply_tome(model, **arguments)
    apply_tome(transformer, **arguments)
    assert np.abs(predict(model, inputs) - before).max() > 1e-3
    assert np.abs(predict(exported, inputs) - predict(model, inputs)).max() <= 2e-5
    remove_tome(model)
    remove_tome(transformer)
    np.testing.assert_array_equal(predict(model, inputs), before)
    assert np.abs(predict(exported, inputs) - before).max() <= 2e-5


def test_training_merges_nothing(make_dit, inputs):
    model = make_dit()
    before = predict(model, inputs)
    apply_tome(model)
    model.train()
    np.testing.assert_array_equal(predict(model, inputs), before)
