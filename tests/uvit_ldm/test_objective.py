import numpy as np
import pytest

from latent_diffusion.schedules import NoiseSchedule
from uvit_ldm.objective import make_objective


def test_the_schedule_is_the_reference(golden):
    arrays = golden("losses_batches")
    schedule = NoiseSchedule.scaled_linear()
    np.testing.assert_allclose(schedule.betas, arrays["_betas"], rtol=1e-12)
    np.testing.assert_allclose(schedule.alphas_cumprod, arrays["cum_alphas"][1:], rtol=1e-12)


@pytest.mark.parametrize("step", range(3))
def test_noisy_latents(golden_training, golden, step):
    np.testing.assert_allclose(golden_training.noisy[step], golden("losses_batches")["xn"][step], rtol=0, atol=2e-6)


@pytest.mark.parametrize("step", range(3))
def test_losses_of_each_sample(golden_training, golden, step):
    arrays = golden("losses_batches")
    np.testing.assert_allclose(golden_training.losses[step], arrays["loss_per_sample"][step], rtol=0, atol=1e-5)
    np.testing.assert_allclose(golden_training.losses[step].mean(), arrays["loss_mean"][step], rtol=0, atol=1e-5)


def test_gradients(golden_training, golden):
    expected = golden("losses_grad")
    assert {f"grad.{name}" for name in golden_training.grads} == expected.keys()
    for key, reference in expected.items():
        difference = np.abs(golden_training.grads[key.removeprefix("grad.")] - reference).max()
        assert difference <= max(5e-6, 1e-4 * np.abs(reference).max()), key


def test_three_optimizer_steps(golden_training, golden):
    expected = golden("losses_param_delta3")
    assert {f"param_delta3.{name}" for name in golden_training.delta} == expected.keys()
    names = {key: key.removeprefix("param_delta3.") for key in expected}
    found = np.concatenate([np.abs(golden_training.delta[names[k]] - v).reshape(-1) for k, v in expected.items()])
    assert np.quantile(found, 0.999) <= 1e-6
    assert found.max() <= 1e-4


def test_the_average_after_them(golden_training, official_weights):
    assert golden_training.ema.keys() == official_weights["uvit_ema"].keys()
    for name, value in golden_training.ema.items():
        np.testing.assert_allclose(value, official_weights["uvit_ema"][name], rtol=0, atol=2e-6, err_msg=name)


def test_a_fast_average_after_them(golden_training, golden):
    expected = {k: v for k, v in golden("losses_float64").items() if k.startswith("ema_half.")}
    assert len(expected) == 12
    for key, reference in expected.items():
        value = golden_training.ema_half[key.removeprefix("ema_half.")]
        assert np.quantile(np.abs(value - reference), 0.99) <= 2e-6, key


def test_the_learning_rate_of_the_first_updates(golden):
    """`constant_with_warmup` of PaddleNLP is the reference's `min(step / warmup_steps, 1)`."""
    from paddlenlp.trainer.trainer_utils import get_constant_schedule_with_warmup

    arrays = golden("losses_batches")
    schedule = get_constant_schedule_with_warmup(2e-4, num_warmup_steps=5000)
    for step, expected in zip(arrays["lr_step_index"], arrays["lr_at_step_index"], strict=True):
        schedule.step(int(step))
        np.testing.assert_allclose(schedule.get_lr(), expected, rtol=1e-6)


def test_timesteps_run_from_1_to_1000():
    objective, rng = make_objective(), np.random.default_rng(0)
    drawn = np.array([objective.draw(rng, (1, 1, 1))["t"] for _ in range(20000)])
    assert drawn.min() == 1 and drawn.max() == 1000
