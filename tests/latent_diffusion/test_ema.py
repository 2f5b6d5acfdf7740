import numpy as np
import paddle
import pytest

from latent_diffusion.ema import EMA
from latent_diffusion.errors import InputError


def small_model() -> paddle.nn.Layer:
    paddle.seed(0)
    model = paddle.nn.Sequential(paddle.nn.Linear(3, 5), paddle.nn.Linear(5, 2))
    model[1].bias.stop_gradient = True
    return model


def values(state) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in state.items()}


def shift(model: paddle.nn.Layer, amount: float) -> None:
    with paddle.no_grad():
        for p in model.parameters():
            p.set_value(p + amount)


def test_the_average_matches_the_reference(golden_training, golden):
    expected = golden("losses_ema_delta3")
    assert {f"ema_delta3/{name}" for name in golden_training.ema_delta} == expected.keys()
    for name, value in golden_training.ema_delta.items():
        np.testing.assert_allclose(value, expected[f"ema_delta3/{name}"], rtol=0, atol=5e-7, err_msg=name)


def test_a_fast_average_matches_the_reference(golden_training, golden):
    """With a decay of 0.5, as 0.9999 moves the average by no more than rounding in three steps."""
    expected = golden("losses_ema_fast_delta3")
    found = [np.abs(golden_training.ema_fast_delta[k.split("/")[1]] - v).reshape(-1) for k, v in expected.items()]
    found = np.concatenate(found)
    assert np.quantile(found, 0.999) <= 2e-7 and found.max() <= 3e-4


def test_the_formula():
    model = small_model()
    ema, expected = EMA(model, 0.75), values(model.state_dict())
    for update in (1, 2, 3):
        shift(model, 0.5)
        ema.update(update)
        for name, p in model.named_parameters():
            expected[name] = p.numpy() if p.stop_gradient else 0.75 * expected[name] + 0.25 * p.numpy()
    state = ema.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in state.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-6, err_msg=name)


def test_warm_up_forgets_the_start():
    plain, warm = EMA(small_model(), 0.9999), EMA(small_model(), 0.9999, warmup=True)
    assert plain.decay_at(1) == 0.9999
    assert warm.decay_at(1) == 2 / 11
    assert warm.decay_at(90) == pytest.approx(0.91)
    assert warm.decay_at(10**6) == 0.9999
    decays = [warm.decay_at(n) for n in range(1, 200)]
    assert decays == sorted(decays)


def test_warm_up_is_used_by_updates():
    model = small_model()
    ema, start = EMA(model, 0.9999, warmup=True), values(model.state_dict())
    shift(model, 1.0)
    ema.update(1)
    np.testing.assert_allclose(ema.state_dict()["0.weight"].numpy(), start["0.weight"] + 9 / 11, rtol=1e-5)


def test_updates_leave_the_model_alone():
    model = small_model()
    ema, before = EMA(model, 0.5), values(model.state_dict())
    ema.update(1)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])


def test_applied_holds_the_averages_and_restores_bit_for_bit():
    model = small_model()
    ema = EMA(model, 0.5)
    shift(model, 0.1)
    ema.update(1)
    shift(model, 0.1)
    own, averages = values(model.state_dict()), values(ema.state_dict())
    with ema.applied() as inside:
        assert inside is model
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value.numpy(), averages[name])
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), own[name])
    assert np.any(own["0.weight"] != averages["0.weight"])


def test_applied_restores_after_an_error():
    model = small_model()
    ema = EMA(model, 0.5)
    shift(model, 1.0)
    own = values(model.state_dict())
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), own[name])


def test_applied_leaves_gradients_on():
    model = small_model()
    with EMA(model).applied():
        pass
    assert paddle.is_grad_enabled()
    model(paddle.ones([1, 3])).sum().backward()
    assert model[0].weight.grad is not None


def test_state_round_trip():
    model = small_model()
    ema = EMA(model, 0.5)
    shift(model, 1.0)
    ema.update(1)
    state = values(ema.state_dict())
    restored = EMA(small_model(), 0.5)
    restored.set_state_dict(state)
    np.testing.assert_array_equal(restored.state_dict()["0.weight"].numpy(), state["0.weight"])
    # And it goes on from there.
    shift(restored.model, 1.0)
    for average in (ema, restored):
        average.update(2)
    np.testing.assert_array_equal(restored.state_dict()["0.weight"].numpy(), ema.state_dict()["0.weight"].numpy())


def test_weights_of_another_model_are_refused_by_name():
    ema = EMA(small_model())
    state = values(ema.state_dict())
    with pytest.raises(InputError, match=r"1\.weight"):
        ema.set_state_dict({name: value for name, value in state.items() if name != "1.weight"})
    with pytest.raises(InputError, match=r"0\.weight"):
        ema.set_state_dict({**state, "0.weight": state["0.weight"].T})


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5, float("nan")])
def test_a_decay_that_cannot_be_is_refused(decay):
    with pytest.raises(InputError, match="decay"):
        EMA(small_model(), decay)


def test_float32_masters_take_the_place_of_half_precision_weights():
    model = small_model()
    ema = EMA(model, decay=0.5)
    before = values(ema.state_dict())
    masters = {p.name: p + 1.0 for p in model.parameters() if not p.stop_gradient}
    ema.update(1, masters)
    after = values(ema.state_dict())
    for name, p in model.named_parameters():
        np.testing.assert_allclose(after[name], before[name] + (0.0 if p.stop_gradient else 0.5), rtol=1e-6)
