import numpy as np
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.schedules import NoiseSchedule, spaced_timesteps, strided_timesteps

KEPT = {
    "full": np.arange(1000),
    "10": spaced_timesteps(1000, 10),
    "250": spaced_timesteps(1000, 250),
    "ddim10": strided_timesteps(1000, 10),
    "ddim25": strided_timesteps(1000, 25),
}


@pytest.mark.parametrize("name", KEPT)
def test_timesteps_match_the_reference(golden, name):
    np.testing.assert_array_equal(KEPT[name], golden("sampling")[f"schedule_{name}/use_timesteps"])


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("array", ["betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"])
def test_respaced_schedules_match_the_reference(golden, name, array):
    actual = getattr(NoiseSchedule.linear().respaced(KEPT[name]), array)
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, golden("sampling")[f"schedule_{name}/{array}"], rtol=1e-10, atol=0)


def test_the_linear_schedule_itself_matches_the_reference(golden):
    arrays, schedule = golden("sampling"), NoiseSchedule.linear()
    assert len(schedule) == 1000
    for name in ("betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"):
        np.testing.assert_allclose(getattr(schedule, name), arrays[f"schedule_full/{name}"], rtol=1e-10, atol=0)


def test_the_posterior_is_that_of_bayes():
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), both normal."""
    schedule = NoiseSchedule.linear(50)
    step, prior = schedule.betas, 1 - schedule.alphas_cumprod_prev
    signal = np.sqrt(1 - schedule.betas)
    precision = signal[1:] ** 2 / step[1:] + 1 / prior[1:]
    np.testing.assert_allclose(schedule.posterior_variance[1:], 1 / precision, rtol=1e-10)
    np.testing.assert_allclose(schedule.posterior_mean_coef2[1:], signal[1:] / step[1:] / precision, rtol=1e-10)
    from_x_start = np.sqrt(schedule.alphas_cumprod_prev[1:]) / prior[1:] / precision
    np.testing.assert_allclose(schedule.posterior_mean_coef1[1:], from_x_start, rtol=1e-10)
    assert schedule.posterior_variance[0] == 0 and np.isfinite(schedule.posterior_log_variance_clipped).all()
    assert schedule.posterior_mean_coef1[0] == pytest.approx(1) and schedule.posterior_mean_coef2[0] == 0


@pytest.mark.parametrize("function", [spaced_timesteps, strided_timesteps])
@pytest.mark.parametrize("steps", [1, 2, 7, 333, 999, 1000])
def test_timesteps_ascend_within_range(function, steps):
    kept = function(1000, steps)
    assert kept.dtype == np.int64 and len(kept) == steps
    assert kept[0] == 0 and kept[-1] < 1000 and (np.diff(kept) > 0).all()


def test_spaced_timesteps_reach_the_last_one_and_strided_do_not():
    assert spaced_timesteps(1000, 10).tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert strided_timesteps(1000, 10).tolist() == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]


@pytest.mark.parametrize("function", [spaced_timesteps, strided_timesteps])
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_cannot_be_is_refused(function, steps):
    with pytest.raises(InputError, match=str(steps)):
        function(1000, steps)
