"""Single-step DPM-Solver++ of third order, as U-ViT samples with it.

C. Lu et al., "DPM-Solver++", arXiv 2211.01095, and "DPM-Solver", arXiv 2206.00927, algorithm 2; `dpm_solver_pp.py` of
baofff/U-ViT with method "fast", uniform time steps and data prediction. ppdiffusers' single-step scheduler interpolates
otherwise and visits whole timesteps only, so its results are others.

Times t run from 1 (noise) to 0.001; the network sees 1000 t, not rounded. All coefficients are computed in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle

from latent_diffusion.schedules import NoiseSchedule

START, END = 1.0, 1e-3
ORDER = 3


class ContinuousSchedule:
    """A discrete schedule of T steps at any time t: log alpha is linear between the times n / T, and beyond them."""

    def __init__(self, schedule: NoiseSchedule):
        self.times = np.linspace(1 / len(schedule), 1.0, len(schedule))
        self.log_alphas = 0.5 * np.log(schedule.alphas_cumprod)

    def log_alpha(self, t: np.ndarray) -> np.ndarray:
        """log of the factor of the clean latent at times t."""
        return _interpolate(t, self.times, self.log_alphas)

    def half_log_snr(self, t: np.ndarray) -> np.ndarray:
        """lambda = log(alpha / sigma) at times t."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))

    def time_at(self, half_log_snr: np.ndarray) -> np.ndarray:
        """The time t of a lambda."""
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * np.asarray(half_log_snr))
        return _interpolate(log_alpha, self.log_alphas[::-1], self.times[::-1])


def _interpolate(x: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Linear interpolation at x, and linear extrapolation; xs ascend."""
    i = np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2)
    return ys[i] + (x - xs[i]) * (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])


def orders(steps: int) -> list[int]:
    """Orders of the updates that together call the network `steps` times."""
    whole, rest = divmod(steps, ORDER)
    if rest:
        return [ORDER] * whole + [rest]
    return [ORDER] * (whole - 1) + [2, 1]


@dataclass(frozen=True)
class _Point:
    """A time with its half-log-SNR, alpha and sigma."""

    t: float
    lam: float
    alpha: float
    sigma: float


class DPMSolver:
    """Walks from noise to a latent in `steps` calls of the network; see the module.

    Args:
        schedule: what the network was trained on, of 1000 steps.
        steps: at least 1.
    """

    name = "dpm-solver++"

    def __init__(self, schedule: NoiseSchedule, steps: int):
        self.schedule, self.steps, self.train_steps = ContinuousSchedule(schedule), steps, len(schedule)

    def sample(
        self,
        denoise: Callable[[paddle.Tensor, float], paddle.Tensor],
        latents: paddle.Tensor,
        on_step: Callable[[], object] | None = None,
    ) -> paddle.Tensor:
        """The latents that noise becomes, float32 [B, C, H, W].

        Args:
            denoise: `denoise(x, timestep)` predicts the noise in x; the timestep is a float in (1, 1000].
            latents: standard normal, float32 [B, C, H, W].
            on_step: called after each call of `denoise`.
        """

        def data(x: paddle.Tensor, at: _Point) -> paddle.Tensor:
            noise = denoise(x, at.t * self.train_steps)
            if on_step:
                on_step()
            return (x - at.sigma * noise) / at.alpha

        grid, position, x = np.linspace(START, END, self.steps + 1), 0, latents
        for order in orders(self.steps):
            x = self._update(data, x, grid[position : position + order + 1])
            position += order
        return x

    def _update(self, data: Callable[[paddle.Tensor, _Point], paddle.Tensor], x, grid: np.ndarray) -> paddle.Tensor:
        """One update from `grid[0]` to `grid[-1]`, of the order that the number of times between gives."""
        lambdas = self.schedule.half_log_snr(grid)
        # Times between come back from their lambda, as in the reference: they are the grid's up to rounding.
        points = [self._point(grid[0]), *(self._point(self.schedule.time_at(lam)) for lam in lambdas[1:-1])]
        start, end, h = points[0], self._point(grid[-1]), lambdas[-1] - lambdas[0]
        ratios = (lambdas[1:-1] - lambdas[0]) / h
        first = data(x, start)
        if len(points) == 1:
            return _step(x, first, start, end)
        middle = data(_step(x, first, start, points[1]), points[1])
        if len(points) == 2:
            correction = -0.5 / ratios[0] * np.expm1(-h)
            return _step(x, first, start, end) + end.alpha * correction * (middle - first)
        at_second = _step(x, first, start, points[2])
        correction = ratios[1] / ratios[0] * _phi(ratios[1] * h)
        last = data(at_second + points[2].alpha * correction * (middle - first), points[2])
        return _step(x, first, start, end) + end.alpha * _phi(h) / ratios[1] * (last - first)

    def _point(self, t: float) -> _Point:
        log_alpha = float(self.schedule.log_alpha(t))
        sigma = float(np.sqrt(-np.expm1(2 * log_alpha)))
        return _Point(float(t), log_alpha - float(np.log(sigma)), float(np.exp(log_alpha)), sigma)


def _step(x: paddle.Tensor, data: paddle.Tensor, start: _Point, end: _Point) -> paddle.Tensor:
    """The step of first order: exact if the data prediction did not change on the way."""
    return end.sigma / start.sigma * x - end.alpha * float(np.expm1(start.lam - end.lam)) * data


def _phi(h: float) -> float:
    """(exp(-h) - 1) / h + 1."""
    return float(np.expm1(-h) / h + 1.0)
