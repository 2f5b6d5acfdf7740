import re

import numpy as np
import paddle
import pytest

from latent_diffusion.objectives import LearnedRangeDDPM
from latent_diffusion.schedules import NoiseSchedule

# The true gradient of key biases is zero, since a softmax does not see them: what is there is rounding, which AdamW
# turns into whole steps. They are left out of comparisons.
QKV_BIAS = re.compile(r"blocks\.\d+\.attn\.qkv\.bias")
KEYS = slice(64, 128)


def without_keys(name: str, values: np.ndarray) -> np.ndarray:
    return np.delete(values, KEYS) if QKV_BIAS.fullmatch(name) else values


def differences(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    """All absolute differences between weights, key biases apart."""
    found = []
    for key, value in expected.items():
        name = key.removeprefix(prefix)
        assert actual[name].shape == value.shape
        found.append(np.abs(without_keys(name, actual[name] - value)).reshape(-1))
    return np.concatenate(found)


@pytest.fixture
def objective() -> LearnedRangeDDPM:
    return LearnedRangeDDPM(NoiseSchedule.linear())


@pytest.mark.parametrize("term", ["loss", "mse", "vb"])
@pytest.mark.parametrize("step", range(3))
def test_losses(golden_training, golden, step, term):
    actual = golden_training.losses[step][term]
    assert actual.shape == (4,)
    np.testing.assert_allclose(actual, golden("losses_batches")[term][step], rtol=0, atol=2e-5)


@pytest.mark.parametrize("step", range(3))
def test_noisy_latents_and_model_outputs(golden_training, golden, step):
    expected = golden("losses_batches")
    np.testing.assert_allclose(golden_training.noisy[step], expected["x_t"][step], rtol=0, atol=5e-6)
    np.testing.assert_allclose(golden_training.outputs[step], expected["model_output"][step], rtol=0, atol=1e-4)


def test_gradients(golden_training, golden):
    expected = golden("losses_grad")
    assert {f"grad/{name}" for name in golden_training.grads} == expected.keys() and len(expected) == 41
    for key, reference in expected.items():
        name = key.removeprefix("grad/")
        actual = golden_training.grads[name]
        assert actual.shape == reference.shape
        if QKV_BIAS.fullmatch(name):
            assert np.abs(actual[KEYS]).max() < 1e-7
        largest = np.abs(without_keys(name, reference)).max()
        assert np.abs(without_keys(name, actual - reference)).max() <= 1e-4 * largest, name


def test_rows_of_absent_classes_get_no_gradient(golden_training, golden):
    table = golden_training.grads["y_embedder.embedding_table.weight"]
    absent = sorted(set(range(11)) - set(golden("losses_batches")["y"][0].tolist()))
    assert len(absent) == 7
    assert not table[absent].any()
    assert np.abs(np.delete(table, absent, axis=0)).max(axis=1).min() > 0


def test_three_optimizer_steps(golden_training, golden):
    expected = golden("losses_delta3")
    assert {f"delta3/{name}" for name in golden_training.delta} == expected.keys()
    found = differences(golden_training.delta, expected, "delta3/")
    assert np.quantile(found, 0.999) <= 2e-7
    assert np.quantile(found, 0.9999) <= 5e-6
    assert found.max() <= 3e-4
    assert not golden_training.delta["pos_embed"].any()


def test_the_bound_trains_the_variance_only(objective):
    rng = np.random.default_rng(0)
    latents, noise, output = (
        paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32))
        for shape in ([3, 4, 4, 4],) * 2 + ([3, 8, 4, 4],)
    )
    output.stop_gradient = False
    terms = objective.losses(lambda x, t: output, latents, paddle.to_tensor([0, 1, 999]), noise)
    (grad,) = paddle.grad(terms["vb"].sum(), output, retain_graph=True)
    assert not grad[:, :4].numpy().any() and np.abs(grad[:, 4:].numpy()).max() > 0
    (grad,) = paddle.grad(terms["mse"].sum(), output)
    assert np.abs(grad[:, :4].numpy()).max() > 0 and not grad[:, 4:].numpy().any()


def test_the_bound_vanishes_for_the_true_posterior(objective):
    """The KL divergence is zero where mean and variance are those of the posterior."""
    rng = np.random.default_rng(0)
    latents, noise = (paddle.to_tensor(rng.standard_normal((3, 4, 4, 4), dtype=np.float32)) for _ in range(2))
    t = paddle.to_tensor([5, 500, 999])

    def denoise(x, t):
        return paddle.concat([noise, paddle.full_like(noise, -1.0)], axis=1)  # -1: the lower end of the range

    terms = objective.losses(denoise, latents, t, noise)
    np.testing.assert_allclose(terms["vb"].numpy(), 0, atol=1e-4)
    np.testing.assert_allclose(terms["mse"].numpy(), 0, atol=0)


def test_a_model_without_variance_trains_on_the_error_alone(objective):
    latents, noise = paddle.zeros([2, 4, 4, 4]), paddle.ones([2, 4, 4, 4])
    terms = objective.losses(lambda x, t: paddle.full_like(x, 3.0), latents, paddle.to_tensor([0, 9]), noise)
    assert terms.keys() == {"loss", "mse"}
    np.testing.assert_array_equal(terms["loss"].numpy(), [4.0, 4.0])


def test_losses_are_float32_for_a_half_precision_model(objective):
    latents = paddle.zeros([2, 4, 4, 4])
    output = paddle.zeros([2, 8, 4, 4], "float16")
    terms = objective.losses(lambda x, t: output, latents, paddle.to_tensor([0, 9]), paddle.ones_like(latents))
    assert all(term.dtype == paddle.float32 for term in terms.values())


def test_draw_is_deterministic(objective):
    first, again, other = (objective.draw(np.random.default_rng(seed), (4, 8, 8)) for seed in (7, 7, 8))
    assert first["t"] == again["t"]
    np.testing.assert_array_equal(first["noise"], again["noise"])
    assert np.any(first["noise"] != other["noise"])


def test_draw_is_in_range(objective):
    rng = np.random.default_rng(0)
    samples = [objective.draw(rng, (4, 8, 8)) for _ in range(10000)]
    t = np.stack([sample["t"] for sample in samples])
    assert t.dtype == np.int64 and t.min() == 0 and t.max() == 999
    assert abs(t.mean() - 499.5) < 10
    noise = np.stack([sample["noise"] for sample in samples[:200]])
    assert noise.dtype == np.float32 and noise.shape == (200, 4, 8, 8)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
