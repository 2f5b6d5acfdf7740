import numpy as np
import paddle
import pytest

from latent_diffusion.schedules import NoiseSchedule
from sdxl_lora.objective import Prediction, WeightedPrediction

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (4, 8, 8)
T = np.array([0, 100, 999])


def losses_of(prediction: Prediction, output: np.ndarray, **options) -> np.ndarray:
    """Losses at `T` of a network that predicts `output`, of latents 2 and noise 1."""
    objective = WeightedPrediction(SCHEDULE, prediction, **options)
    latents, noise = paddle.full([3, *SHAPE], 2.0), paddle.ones([3, *SHAPE])
    predicted = paddle.to_tensor(output, "float32").reshape([3, 1, 1, 1]).expand([3, *SHAPE])
    return objective.losses(lambda x, t: predicted, latents, paddle.to_tensor(T), noise)["loss"].numpy()


def test_the_noise_is_predicted():
    np.testing.assert_allclose(losses_of(Prediction.EPSILON, np.array([1.0, 0.0, 3.0])), [0, 1, 4])


def test_the_velocity_is_predicted():
    signal, sigma = np.sqrt(SCHEDULE.alphas_cumprod[T]), np.sqrt(1 - SCHEDULE.alphas_cumprod[T])
    velocity = signal * 1 - sigma * 2
    np.testing.assert_allclose(losses_of(Prediction.VELOCITY, velocity + [0, 1, 2]), [0, 1, 4], atol=1e-5)


def test_the_network_sees_noisy_latents():
    seen = []

    def denoise(x, t):
        seen.append(x.numpy()[:, 0, 0, 0])
        return x

    latents, noise = paddle.full([3, *SHAPE], 2.0), paddle.ones([3, *SHAPE])
    WeightedPrediction(SCHEDULE).losses(denoise, latents, paddle.to_tensor(T), noise)
    acp = SCHEDULE.alphas_cumprod[T]
    np.testing.assert_allclose(seen[0], 2 * np.sqrt(acp) + np.sqrt(1 - acp), rtol=1e-5)


@pytest.mark.parametrize(("prediction", "added"), [(Prediction.EPSILON, 0.0), (Prediction.VELOCITY, 1.0)])
def test_timesteps_are_weighted_by_the_smaller_of_their_snr_and_gamma(prediction, added):
    acp = SCHEDULE.alphas_cumprod[T]
    snr = acp / (1 - acp)
    assert snr[0] > 5 > snr[2]
    plain = losses_of(prediction, np.zeros(3))
    weighted = losses_of(prediction, np.zeros(3), snr_gamma=5.0)
    np.testing.assert_allclose(weighted / plain, np.minimum(snr, 5) / (snr + added), rtol=1e-5)


def test_the_noise_offset_is_one_number_a_channel():
    plain, offset = (
        WeightedPrediction(SCHEDULE, noise_offset=scale).draw(np.random.default_rng(3), SHAPE)["noise"]
        for scale in (0.0, 0.5)
    )
    difference = offset - plain
    np.testing.assert_allclose(difference, difference[:, :1, :1].repeat(8, 1).repeat(8, 2), atol=1e-6)
    assert offset.dtype == np.float32 and len(np.unique(difference[:, 0, 0])) == SHAPE[0]
    many = [
        WeightedPrediction(SCHEDULE, noise_offset=0.5).draw(np.random.default_rng(k), SHAPE)["noise"].mean()
        for k in range(400)
    ]
    assert np.std(many) == pytest.approx(np.sqrt(0.25 / 4 + 1 / 256), rel=0.15)


@pytest.mark.parametrize(("prediction", "last"), [(Prediction.EPSILON, 1.0), (Prediction.VELOCITY, 0.0)])
def test_a_signal_that_ends_at_zero_has_weights_too(prediction, last):
    """As with `rescale_betas_zero_snr`: SNR / SNR tends to 1, and SNR / (SNR + 1) to 0."""
    betas = SCHEDULE.betas.copy()
    betas[-1] = 1.0
    objective = WeightedPrediction(NoiseSchedule(betas), prediction, snr_gamma=5.0)
    latents = paddle.zeros([1, *SHAPE])
    losses = objective.losses(lambda x, t: paddle.zeros_like(x) + 2.0, latents, paddle.to_tensor([999]), latents)
    np.testing.assert_allclose(losses["loss"].numpy(), [4.0 * last])
