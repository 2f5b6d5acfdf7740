import numpy as np
import paddle
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.sampling import draw_noise, sample_generators
from latent_diffusion.schedules import NoiseSchedule
from uvit_ldm.dpm_solver import ContinuousSchedule, orders
from uvit_ldm.modeling import UViT
from uvit_ldm.sampling import ddim_scheduler, make_sampler, sample_latents

# Samples of random weights grow to 60 along a run; this is 3e-5 of that.
LATENTS, PREDICTIONS, TIMES = 2e-3, 5e-4, 1e-3


class GivenNoise(np.random.Generator):
    """Hands out a given array in place of a random one."""

    def __init__(self, array: np.ndarray):
        super().__init__(np.random.PCG64(0))
        self.array = array

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        assert size == self.array.shape and dtype == self.array.dtype
        return self.array


def sample(model: UViT, arrays: dict, sampler, scale: float, **settings) -> np.ndarray:
    """The latents of the reference's prompts and noise; `scale` counts as the reference does."""
    noise = [GivenNoise(array) for array in arrays["z_init"]]
    latents = sample_latents(
        model, arrays["context"], arrays["empty_context"], sampler, guidance_scale=1 + scale, seed=noise, **settings
    )
    assert latents.dtype == paddle.float32
    return latents.numpy()


@pytest.mark.parametrize(
    ("steps", "scale", "expected"),
    [
        (10, 1.0, "final"),
        (9, 1.0, "final_steps9"),
        (11, 1.0, "final_steps11"),
        (50, 1.0, "final_steps50"),
        (10, 0.0, "final_scale0"),
        (10, 2.5, "final_scale2p5"),
    ],
)
def test_dpm_solver_matches_the_reference(make_uvit, golden, steps, scale, expected):
    arrays, calls = golden("sampling"), []
    sampler = make_sampler("dpm-solver++", steps)
    found = sample(make_uvit("uvit_ema"), arrays, sampler, scale, on_step=lambda: calls.append(1))
    np.testing.assert_allclose(found, arrays[expected], rtol=0, atol=LATENTS)
    assert len(calls) == steps


def test_each_call_of_dpm_solver_matches_the_reference(make_uvit, golden, monkeypatch):
    arrays, calls, forward = golden("sampling"), [], UViT.forward

    def recorded(self, x, t, context):
        out = forward(self, x, t, context)
        calls.append([value.numpy() for value in (x, t, context, out)])
        return out

    monkeypatch.setattr(UViT, "forward", recorded)
    sample(make_uvit("uvit_ema"), arrays, make_sampler("dpm-solver++", 10), 1.0)
    assert len(calls) == 10
    for k, (x, t, context, out) in enumerate(calls):
        np.testing.assert_allclose(t, np.tile(arrays["call_t_model"][k], 2), rtol=0, atol=TIMES)
        np.testing.assert_array_equal(context[:2], np.broadcast_to(arrays["empty_context"], context[:2].shape))
        np.testing.assert_array_equal(context[2:], arrays["context"])
        np.testing.assert_allclose(x[2:], arrays["call_x"][k], rtol=0, atol=LATENTS)
        np.testing.assert_allclose(out[:2], arrays["call_uncond"][k], rtol=0, atol=PREDICTIONS)
        np.testing.assert_allclose(out[2:], arrays["call_cond"][k], rtol=0, atol=PREDICTIONS)


def test_the_continuous_schedule_matches_the_reference(golden):
    arrays, schedule = golden("sampling"), ContinuousSchedule(NoiseSchedule.scaled_linear())
    np.testing.assert_allclose(schedule.times, arrays["ns_t_discrete"][0], rtol=0, atol=5e-6)
    np.testing.assert_allclose(schedule.log_alphas, arrays["ns_log_alpha_discrete"][0], rtol=0, atol=5e-6)
    t = arrays["ns_query_t"].astype(np.float64)
    np.testing.assert_allclose(schedule.log_alpha(t), arrays["ns_log_alpha"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(schedule.half_log_snr(t), arrays["ns_lambda"], rtol=0, atol=5e-4)
    found = schedule.time_at(arrays["ns_query_lambda"].astype(np.float64))
    np.testing.assert_allclose(found, arrays["ns_inverse_lambda"], rtol=0, atol=5e-6)


@pytest.mark.parametrize(("steps", "suffix"), [(10, ""), (9, "_steps9"), (11, "_steps11"), (50, "_steps50")])
def test_orders(golden, steps, suffix):
    assert orders(steps) == golden("sampling")[f"orders{suffix}"].tolist()


@pytest.mark.parametrize(("steps", "expected"), [(1, [1]), (2, [2]), (3, [2, 1]), (4, [3, 1])])
def test_orders_of_few_steps(steps, expected):
    assert orders(steps) == expected


def test_the_scheduler_counts_timesteps_as_the_network_was_trained():
    """Entry n of its table is the noise at timestep n."""
    scheduler, schedule = ddim_scheduler(), NoiseSchedule.scaled_linear()
    table = scheduler.alphas_cumprod.numpy()
    np.testing.assert_allclose(table[1:], schedule.alphas_cumprod, rtol=2e-5)
    assert table[1] < table[0] < 1
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))


class Exact:
    """Knows the noise in latents that are normally distributed around 1 with standard deviation 0.5."""

    mean, std = 1.0, 0.5

    def __init__(self):
        self.signal = np.concatenate([[1.0], NoiseSchedule.scaled_linear().alphas_cumprod])

    def __call__(self, x, t):
        a = float(np.interp(t, np.arange(1001), self.signal))
        variance = a * self.std**2 + 1 - a
        return (x - a**0.5 * self.mean) * (1 - a) ** 0.5 / variance


@pytest.mark.parametrize(("name", "tolerance"), [("ddim", 0.05), ("dpm-solver++", 0.04)])
def test_samplers_find_the_distribution_of_the_data(name, tolerance):
    noise = draw_noise(sample_generators(0, range(500)), (1, 4, 4))
    found = make_sampler(name, 50).sample(Exact(), noise).numpy()
    assert abs(found.mean() - Exact.mean) < 0.05 and abs(found.std() - Exact.std) < tolerance


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++"])
def test_one_thousand_steps_visit_each_timestep(name):
    seen = []
    sampler = make_sampler(name, 1000)
    sampler.sample(lambda x, t: seen.append(t) or paddle.zeros_like(x), paddle.zeros([1, 1, 2, 2]))
    assert len(seen) == 1000 and seen[0] == 1000 and seen[-1] >= 1


def test_the_exported_scheduler_can_be_swapped_for_dpm_solver():
    from ppdiffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler.from_config(ddim_scheduler().config)
    scheduler.set_timesteps(25)
    latents, exact = draw_noise(sample_generators(0, range(200)), (1, 4, 4)), Exact()
    for t in scheduler.timesteps:
        assert int(t) >= 1
        latents = scheduler.step(exact(latents, int(t)), t, latents).prev_sample
    assert abs(latents.numpy().mean() - Exact.mean) < 0.1 and abs(latents.numpy().std() - Exact.std) < 0.1


def test_without_guidance_the_empty_prompt_is_not_computed(make_uvit, golden, monkeypatch):
    arrays, batches, forward = golden("sampling"), [], UViT.forward
    monkeypatch.setattr(UViT, "forward", lambda self, x, *rest: batches.append(len(x)) or forward(self, x, *rest))
    sample(make_uvit("uvit_ema"), arrays, make_sampler("ddim", 2), 0.0)
    assert batches == [2, 2]


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++"])
def test_only_steps_in_the_guidance_interval_are_guided(make_uvit, golden, monkeypatch, name):
    arrays, calls, forward = golden("sampling"), [], UViT.forward

    def recorded(self, x, t, context):
        calls.append((float(t[0]), len(x)))
        return forward(self, x, t, context)

    monkeypatch.setattr(UViT, "forward", recorded)
    sample(make_uvit("uvit_ema"), arrays, make_sampler(name, 10), 1.0, guidance_interval=(0.25, 0.6))
    assert [batch for _, batch in calls] == [4 if 250 <= t <= 600 else 2 for t, _ in calls]
    assert {batch for _, batch in calls} == {2, 4} and len(calls) == 10


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++"])
def test_the_ends_of_guidance_intervals_are_all_or_no_guidance(make_uvit, golden, name):
    model, arrays = make_uvit("uvit_ema"), golden("sampling")

    def draw(scale: float, **settings) -> np.ndarray:
        return sample(model, arrays, make_sampler(name, 5), scale, **settings)

    np.testing.assert_array_equal(draw(1.0, guidance_interval=(0.0, 1.0)), draw(1.0))
    np.testing.assert_array_equal(draw(1.0, guidance_interval=(0.0001, 0.0002)), draw(0.0))
    with pytest.raises(InputError, match="guidance interval 0.6 to 0.2"):
        draw(1.0, guidance_interval=(0.6, 0.2))


def test_the_network_is_left_in_its_mode(make_uvit, golden):
    model = make_uvit()
    model.train()
    sample(model, golden("sampling"), make_sampler("ddim", 1), 1.0)
    assert model.training


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("euler", 10, "unknown sampler 'euler'; known are ddim, dpm-solver"),
        ("ddim", 0, "between 1 and 1000, not 0"),
        ("dpm-solver++", 1001, "between 1 and 1000, not 1001"),
    ],
)
def test_what_cannot_be_sampled(name, steps, message):
    with pytest.raises(InputError, match=message):
        make_sampler(name, steps)


def test_contexts_of_another_shape_are_named(uvit):
    contexts = np.zeros((1, 77, 32), np.float32)
    with pytest.raises(InputError, match=r"\[1, 77, 32\] and \[77, 32\], the network takes \[B, 7, 32\] and \[7, 32\]"):
        sample_latents(uvit, contexts, contexts[0], make_sampler("ddim", 1))
