"""Training objectives: a clean latent, a condition and a backbone in, a loss out.

An objective owns timesteps, noise and weighting. Another objective (flow matching, say) is one more subclass of
`Objective`; trainers, features and backbones do not change.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import paddle

from .schedules import NoiseSchedule

# A backbone with its condition filled in: noisy latents [B, C, H, W], timesteps [B] -> [B, C or 2 C, H, W].
Denoiser = Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]


class Objective(ABC):
    """What training minimizes."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Draws what one training sample of latent `shape` (C, H, W) needs: its timestep and noise.

        Returns:
            "t" (a scalar) and "noise" float32 [C, H, W]; batches of these are given to `losses`.
        """

    @abstractmethod
    def losses(
        self, denoise: Denoiser, latents: paddle.Tensor, t: paddle.Tensor, noise: paddle.Tensor
    ) -> dict[str, paddle.Tensor]:
        """Losses of each sample: "loss" [B], which is minimized, and the terms it is the sum of.

        Args:
            denoise: the backbone with its condition.
            latents: clean scaled latents, float32 [B, C, H, W].
            t, noise: batches of what `draw` returned, [B] and [B, C, H, W].
        """


class NoisePrediction(Objective):
    """Noise prediction on a discrete schedule: simple MSE (DDPM, equation 14).

    Args:
        schedule: of T steps.
        first_timestep: the timestep the backbone sees at the schedule's first step; timesteps are drawn evenly from it
            on. 0 in DDPM and DiT, 1 in U-ViT, which counts 1..T.
    """

    def __init__(self, schedule: NoiseSchedule, first_timestep: int = 0):
        self.schedule, self.first_timestep = schedule, first_timestep
        columns = self._schedule_columns()
        self._columns = list(columns)
        self._table = paddle.to_tensor(np.stack(list(columns.values()), axis=1).astype("float32"))

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        t = np.int64(self.first_timestep + rng.integers(len(self.schedule)))
        return {"t": t, "noise": rng.standard_normal(shape, dtype=np.float32)}

    def q_sample(self, x_start: paddle.Tensor, t: paddle.Tensor, noise: paddle.Tensor) -> paddle.Tensor:
        """Noisy latents at t, DDPM equation 4; all [B, C, H, W] but t [B]."""
        at = self._at(t)
        return at["signal"] * x_start + at["noise"] * noise

    def losses(
        self, denoise: Denoiser, latents: paddle.Tensor, t: paddle.Tensor, noise: paddle.Tensor
    ) -> dict[str, paddle.Tensor]:
        eps = denoise(self.q_sample(latents, t, noise), t).astype("float32")
        return {"loss": mean_flat((noise - eps) ** 2)}

    def _schedule_columns(self) -> dict[str, np.ndarray]:
        """What is looked up by timestep, each [T]."""
        acp = self.schedule.alphas_cumprod
        return {"signal": np.sqrt(acp), "noise": np.sqrt(1.0 - acp)}

    def _at(self, t: paddle.Tensor) -> dict[str, paddle.Tensor]:
        """The schedule's columns at t [B], each [B, 1, 1, 1]."""
        rows = paddle.gather(self._table, t - self.first_timestep).reshape([t.shape[0], len(self._columns), 1, 1, 1])
        return {name: rows[:, i] for i, name in enumerate(self._columns)}


class LearnedRangeDDPM(NoisePrediction):
    """Noise prediction with a learned variance: simple MSE plus the variational bound, in bits per dimension.

    The bound trains the variance only (the mean is frozen in it) and is not rescaled: loss type `MSE` with
    `LEARNED_RANGE` variances in the official `gaussian_diffusion.py`. A backbone that predicts no variance trains on
    the MSE alone.
    """

    def _schedule_columns(self) -> dict[str, np.ndarray]:
        acp = self.schedule.alphas_cumprod
        return super()._schedule_columns() | {
            "recip_signal": np.sqrt(1.0 / acp),
            "recip_noise": np.sqrt(1.0 / acp - 1.0),
            "mean_x0": self.schedule.posterior_mean_coef1,
            "mean_xt": self.schedule.posterior_mean_coef2,
            "min_log": self.schedule.posterior_log_variance_clipped,
            "max_log": np.log(self.schedule.betas),
        }

    def losses(
        self, denoise: Denoiser, latents: paddle.Tensor, t: paddle.Tensor, noise: paddle.Tensor
    ) -> dict[str, paddle.Tensor]:
        x_t = self.q_sample(latents, t, noise)
        # In mixed precision the terms are still computed in float32: the bound takes exponentials of log variances.
        output = denoise(x_t, t).astype("float32")
        if output.shape[1] == latents.shape[1]:
            mse = mean_flat((noise - output) ** 2)
            return {"loss": mse, "mse": mse}
        eps, variance_values = output.chunk(2, axis=1)
        mse = mean_flat((noise - eps) ** 2)
        vb = self._variational_bound(latents, x_t, t, eps.detach(), variance_values)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(self, x_start, x_t, t, eps, variance_values) -> paddle.Tensor:
        """Bits per dimension [B]: KL(q(x_{t-1} | x_t, x_0) || p), and at t = 0 the likelihood of x_0."""
        at = self._at(t)
        fraction = (variance_values + 1) / 2  # Improved DDPM, equation 15
        log_variance = fraction * at["max_log"] + (1 - fraction) * at["min_log"]
        pred_x_start = at["recip_signal"] * x_t - at["recip_noise"] * eps
        mean = at["mean_x0"] * pred_x_start + at["mean_xt"] * x_t
        true_mean = at["mean_x0"] * x_start + at["mean_xt"] * x_t
        true_log_variance = at["min_log"].expand(log_variance.shape)
        kl = mean_flat(_normal_kl(true_mean, true_log_variance, mean, log_variance))
        nll = -mean_flat(_discretized_log_likelihood(x_start, mean, 0.5 * log_variance))
        return paddle.where(t == 0, nll, kl) / math.log(2.0)


def mean_flat(x: paddle.Tensor) -> paddle.Tensor:
    """Mean over all axes but the first: [B, ...] -> [B]."""
    return x.flatten(1).mean(axis=1)


def _normal_kl(mean1, log_variance1, mean2, log_variance2) -> paddle.Tensor:
    """KL divergence of two normal distributions, elementwise, in nats."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1.0
        + paddle.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * paddle.exp(-log_variance2)
    )


def _normal_cdf(x: paddle.Tensor) -> paddle.Tensor:
    # The tanh approximation that the official code uses; the exact function would give other losses.
    return 0.5 * (1.0 + paddle.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_log_likelihood(x: paddle.Tensor, mean: paddle.Tensor, log_scale: paddle.Tensor) -> paddle.Tensor:
    """Log-likelihood of x under a normal discretized to bins of 2/255, open beyond -0.999 and 0.999, in nats."""
    centered = x - mean
    inverse_scale = paddle.exp(-log_scale)
    cdf_plus = _normal_cdf(inverse_scale * (centered + 1.0 / 255.0))
    cdf_minus = _normal_cdf(inverse_scale * (centered - 1.0 / 255.0))

    def log(probability: paddle.Tensor) -> paddle.Tensor:
        return paddle.log(probability.clip(min=1e-12))

    inside = paddle.where(x > 0.999, log(1.0 - cdf_minus), log(cdf_plus - cdf_minus))
    return paddle.where(x < -0.999, log(cdf_plus), inside)
