import numpy as np
import paddle
import pytest

from dit import sampling
from dit.configuration import DiTConfig
from dit.modeling import DiT
from dit.sampling import make_sampler, sample_latents
from latent_diffusion.errors import InputError
from latent_diffusion.sampling import sample_generators
from latent_diffusion.schedules import NoiseSchedule, spaced_timesteps

SCALE = 4.0
# Samples of random weights grow along a run, so the bound is relative to the largest value of each step.
STEP_TOLERANCE = 5e-5
RUNS = [("p10", "ddpm"), ("ddim10", "ddim")]


class GivenNoise(np.random.Generator):
    """Hands out given arrays in place of random ones."""

    def __init__(self, arrays: list[np.ndarray]):
        super().__init__(np.random.PCG64(0))
        self.arrays = iter(arrays)

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        array = next(self.arrays)
        assert size == array.shape and dtype == array.dtype
        return array


@pytest.fixture
def trace(monkeypatch):
    """Records what the model is asked and what each step gives."""
    seen = {"t": [], "y": [], "latents": []}
    forward, step = DiT.forward, sampling.Sampler.step

    def recorded_forward(self, x, t, y):
        seen["t"].append(t.numpy())
        seen["y"].append(y.numpy())
        return forward(self, x, t, y)

    def recorded_step(self, *args):
        result = step(self, *args)
        seen["latents"].append(result.numpy())
        return result

    monkeypatch.setattr(DiT, "forward", recorded_forward)
    monkeypatch.setattr(sampling.Sampler, "step", recorded_step)
    return seen


def assert_step_close(actual: np.ndarray, expected: np.ndarray, largest: float) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=STEP_TOLERANCE * largest)


@pytest.mark.parametrize(("run", "name"), RUNS)
def test_each_step_matches_the_reference(dit, golden, trace, run, name):
    """The images of the reference; the halves of its batch get different noise and the second is thrown away."""
    arrays = golden("sampling")
    images = len(arrays["in/y"]) // 2
    noise = [GivenNoise([arrays["in/init_noise"][i], *arrays["in/step_noise"][:, i]]) for i in range(images)]
    result = sample_latents(dit, arrays["in/y"][:images], make_sampler(name, 10), SCALE, noise)
    expected = arrays[f"{run}/samples"]
    assert len(trace["latents"]) == 10
    for k, latents in enumerate(trace["latents"]):
        assert_step_close(latents, expected[k, :images], np.abs(expected[k]).max())
    np.testing.assert_array_equal(result.numpy(), trace["latents"][-1])
    np.testing.assert_array_equal(np.stack(trace["t"]), np.repeat(arrays[f"{run}/model_t"][:, None], 4, axis=1))
    assert all(np.array_equal(y, arrays["in/y"]) for y in trace["y"])
    assert all(next(rng.arrays, None) is None for rng in noise)  # as many draws as the reference makes


@pytest.mark.parametrize(("run", "name"), RUNS)
def test_both_halves_of_the_reference_batch(dit, golden, run, name):
    arrays, sampler = golden("sampling"), make_sampler(name, 10)
    y, latents = paddle.to_tensor(arrays["in/y"]), paddle.to_tensor(arrays["in/init_noise"])
    for k, index in enumerate(sampler.start()):
        t = sampler.timestep_map[index]
        assert t == arrays[f"{run}/model_t"][k]
        with paddle.no_grad():
            output = dit.forward_with_cfg(latents, paddle.full([4], int(t), "int64"), y, SCALE)
            latents = sampler.step(output, index, latents, paddle.to_tensor(arrays["in/step_noise"][k]))
        expected = arrays[f"{run}/samples"][k]
        assert_step_close(latents.numpy(), expected, np.abs(expected).max())


def test_ddpm_without_a_learned_variance():
    """The variance is then that of the posterior."""
    rng = np.random.default_rng(0)
    eps, x, noise = (rng.standard_normal((2, 4, 8, 8), dtype=np.float32) for _ in range(3))
    sampler, schedule = make_sampler("ddpm", 10), NoiseSchedule.linear().respaced(spaced_timesteps(1000, 10))
    for i in sampler.start():
        signal = schedule.alphas_cumprod[i]
        x_start = (x - np.sqrt(1 - signal) * eps) / np.sqrt(signal)
        expected = schedule.posterior_mean_coef1[i] * x_start + schedule.posterior_mean_coef2[i] * x
        expected = expected + np.sqrt(schedule.posterior_variance[i]) * noise
        actual = sampler.step(*(paddle.to_tensor(eps), i, paddle.to_tensor(x), paddle.to_tensor(noise)))
        assert_step_close(actual.numpy(), expected, np.abs(expected).max())


def normal_data_model() -> DiT:
    """A model whose predicted noise is right for normal data of standard deviation 1/2."""
    model = DiT(DiTConfig(4, 2, 4, 1, 1, 16, num_classes=10))
    signal = paddle.to_tensor(NoiseSchedule.linear().alphas_cumprod.astype("float32"))

    def forward(x, t, y):
        at = paddle.gather(signal, t).reshape([-1, 1, 1, 1])
        eps = x * (1 - at).sqrt() / (1 - 0.75 * at)
        return paddle.concat([eps, paddle.zeros_like(eps)], axis=1)

    model.forward = forward
    return model


@pytest.mark.parametrize(
    ("name", "steps", "bound"), [("ddim", 20, 0.25), ("ddim", 500, 0.02), ("dpm-solver++", 20, 0.08)]
)
def test_solvers_on_normal_data_end_at_the_known_solution(name, steps, bound):
    """The flow of normal data scales the initial noise: from the deviation of x_t to that of the data."""
    result = sample_latents(normal_data_model(), [1, 2], make_sampler(name, steps), SCALE, 3).numpy()
    noise = np.stack([rng.standard_normal((4, 4, 4), dtype=np.float32) for rng in sample_generators(3, range(2))])
    expected = noise * 0.5 / np.sqrt(1 - 0.75 * NoiseSchedule.linear().alphas_cumprod[-1])
    assert np.abs(result - expected).max() < bound


def test_ddpm_on_normal_data_keeps_its_deviation():
    result = sample_latents(normal_data_model(), [1] * 200, make_sampler("ddpm", 100), SCALE, 3).numpy()
    assert result.std() == pytest.approx(0.5, rel=0.05) and abs(result.mean()) < 0.02


@pytest.mark.parametrize("name", sampling.SAMPLER_NAMES)
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_samples_are_finite_and_reproducible(dit, name, scale):
    def sample(seed, labels=(0, 9, 3)):
        return sample_latents(dit, list(labels), make_sampler(name, 6), scale, seed)

    latents = sample(5)
    assert latents.shape == [3, 4, 8, 8] and latents.dtype == paddle.float32 and latents.stop_gradient
    assert np.isfinite(latents.numpy()).all()
    np.testing.assert_array_equal(sample(5).numpy(), latents.numpy())
    np.testing.assert_array_equal(sample(sample_generators(5, range(3))).numpy(), latents.numpy())
    assert np.any(sample(6).numpy() != latents.numpy())
    assert np.any(sample(5, (0, 9, 4)).numpy()[2] != latents.numpy()[2])


@pytest.mark.parametrize("name", sampling.SAMPLER_NAMES)
def test_a_sample_does_not_depend_on_its_neighbors(dit, name):
    """Up to rounding: matrix products of other sizes are summed in another order."""
    together = sample_latents(dit, [3, 7, 5], make_sampler(name, 6), SCALE, sample_generators(1, range(10, 13)))
    alone = sample_latents(dit, [7], make_sampler(name, 6), SCALE, sample_generators(1, [11])).numpy()
    assert_step_close(together.numpy()[1:2], alone, np.abs(alone).max())


def test_each_step_is_reported(dit):
    steps = []
    sample_latents(dit, [1], make_sampler("ddim", 5), SCALE, 0, on_step=lambda: steps.append(len(steps)))
    assert len(steps) == 5


@pytest.mark.parametrize("name", sampling.SAMPLER_NAMES)
def test_a_sampler_can_be_used_again(dit, name):
    sampler = make_sampler(name, 4)
    first, again = (sample_latents(dit, [1], sampler, SCALE, 0).numpy() for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", sampling.SAMPLER_NAMES)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_the_model_is_called_once_a_step(name, steps):
    sampler = make_sampler(name, steps)
    t = sampler.timestep_map[sampler.start()]
    assert len(t) == steps and sampler.timestep_map.dtype == np.int64
    assert (np.diff(t) < 0).all() and t.min() >= 0 and t.max() < 1000


def test_no_guidance_takes_half_the_batch(dit, trace):
    sample_latents(dit, [3, 4], make_sampler("ddim", 2), 1.0)
    assert [y.tolist() for y in trace["y"]] == [[3, 4]] * 2


def test_no_guidance_is_guidance_of_one(dit):
    class AlmostOne(float):
        def __eq__(self, other):
            return False

        __hash__ = None

    sampler = make_sampler("ddpm", 4)
    plain = sample_latents(dit, [3, 4], sampler, 1.0).numpy()
    guided = sample_latents(dit, [3, 4], sampler, AlmostOne(1.0)).numpy()
    assert_step_close(plain, guided, np.abs(guided).max())


@pytest.mark.parametrize("name", sampling.SAMPLER_NAMES)
def test_guidance_at_all_steps_is_the_default(dit, name):
    default = sample_latents(dit, [3, 4], make_sampler(name, 4), SCALE).numpy()
    given = sample_latents(dit, [3, 4], make_sampler(name, 4), SCALE, guidance_interval=(0.0, 1.0)).numpy()
    np.testing.assert_array_equal(given, default)


@pytest.mark.parametrize("name", sampling.SAMPLER_NAMES)
def test_an_interval_between_two_timesteps_is_no_guidance(dit, name):
    plain = sample_latents(dit, [3, 4], make_sampler(name, 4), 1.0).numpy()
    found = sample_latents(dit, [3, 4], make_sampler(name, 4), SCALE, guidance_interval=(0.0001, 0.0002)).numpy()
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("name", sampling.SAMPLER_NAMES)
def test_only_steps_in_the_interval_are_guided(dit, trace, name):
    sample_latents(dit, [3, 4], make_sampler(name, 10), SCALE, guidance_interval=(0.25, 0.6))
    guided = [250 <= t[0] <= 600 for t in trace["t"]]
    assert 2 <= sum(guided) <= 4 and len(guided) == 10
    assert [len(y) for y in trace["y"]] == [4 if inside else 2 for inside in guided]
    assert all(y.tolist()[:2] == [3, 4] for y in trace["y"])


def test_an_interval_that_cannot_be_is_refused(dit):
    with pytest.raises(InputError, match="guidance interval 0.6 to 0.2"):
        sample_latents(dit, [1], make_sampler("ddim", 2), guidance_interval=(0.6, 0.2))


def test_random_state_and_mode_are_left_alone(dit):
    sampler = make_sampler("ddpm", 3)

    def draws(between):
        paddle.seed(3)
        np.random.seed(3)  # noqa: NPY002
        between()
        return paddle.randn([4]).numpy(), np.random.standard_normal(4)  # noqa: NPY002

    expected = draws(lambda: None)
    dit.train()
    actual = draws(lambda: sample_latents(dit, [1], sampler, SCALE, 0))
    assert dit.training and all(layer.training for layer in dit.sublayers())
    np.testing.assert_array_equal(actual, expected)
    dit.eval()
    sample_latents(dit, [1], sampler, SCALE, 0)
    assert not dit.training


def test_mode_and_gradients_return_after_an_error(dit, monkeypatch):
    modes = []

    def fail(*args):
        modes.append(dit.training)
        raise RuntimeError("inside")

    monkeypatch.setattr(sampling.Sampler, "step", fail)
    dit.train()
    with pytest.raises(RuntimeError, match="inside"):
        sample_latents(dit, [1], make_sampler("ddim", 2))
    assert modes == [False] and dit.training and paddle.is_grad_enabled()


@pytest.mark.parametrize("labels", [[10], [-1], [0, 999], [], [[1]], [1.5], 3])
def test_labels_that_are_no_classes_are_refused(dit, labels):
    with pytest.raises(InputError, match="label"):
        sample_latents(dit, labels, make_sampler("ddim", 2))


@pytest.mark.parametrize("labels", [[1, 2], np.array([1, 2], np.int32), paddle.to_tensor([1, 2])])
def test_labels_of_any_kind(dit, labels):
    expected = sample_latents(dit, np.array([1, 2]), make_sampler("ddim", 2)).numpy()
    np.testing.assert_array_equal(sample_latents(dit, labels, make_sampler("ddim", 2)).numpy(), expected)


def test_a_negative_seed_is_refused(dit):
    with pytest.raises(InputError, match="-1"):
        sample_latents(dit, [1], make_sampler("ddim", 2), SCALE, -1)


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 0), ("ddpm", 1001), ("ddim", 0), ("dpm-solver++", 1000)])
def test_a_number_of_steps_that_cannot_be_is_refused(name, steps):
    with pytest.raises(InputError, match=str(steps)):
        make_sampler(name, steps)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(InputError, match="'euler'.*ddpm, ddim"):
        make_sampler("euler", 10)
