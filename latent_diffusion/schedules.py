"""Noise schedules: which variance each timestep adds, and what follows from it, in float64.

Reference: `gaussian_diffusion.py` and `respace.py` of facebookresearch/DiT; equations are those of DDPM
(Ho et al., arXiv 2006.11239) and of Improved DDPM (Nichol and Dhariwal, arXiv 2102.09672).
"""

import numpy as np

from .errors import InputError


class NoiseSchedule:
    """A discrete diffusion process of T steps, made from its betas (float64 [T]).

    Attributes (all float64 [T]):
        betas, alphas_cumprod, alphas_cumprod_prev: variance added by step t; signal kept after t and before t.
        posterior_variance, posterior_log_variance_clipped: of q(x_{t-1} | x_t, x_0), DDPM equation 7; the log has
            its value at t = 0 (minus infinity) replaced by that at t = 1.
        posterior_mean_coef1, posterior_mean_coef2: factors of x_0 and x_t in the mean of that posterior.
    """

    def __init__(self, betas: np.ndarray):
        self.betas = np.asarray(betas, dtype=np.float64)
        alphas = 1.0 - self.betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        noise, noise_prev = 1.0 - self.alphas_cumprod, 1.0 - self.alphas_cumprod_prev
        self.posterior_variance = self.betas * noise_prev / noise
        self.posterior_log_variance_clipped = np.log(
            np.append(self.posterior_variance[1:2], self.posterior_variance[1:])
        )
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / noise
        self.posterior_mean_coef2 = noise_prev * np.sqrt(alphas) / noise

    def __len__(self) -> int:
        return len(self.betas)

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> "NoiseSchedule":
        """The linear schedule of DDPM, which DiT trains with."""
        return cls(np.linspace(start, end, steps))

    @classmethod
    def scaled_linear(cls, steps: int = 1000, start: float = 0.00085, end: float = 0.0120) -> "NoiseSchedule":
        """The schedule of Stable Diffusion, which U-ViT trains on: the roots of the betas are linear."""
        return cls(np.linspace(start**0.5, end**0.5, steps) ** 2)

    def respaced(self, timesteps: np.ndarray) -> "NoiseSchedule":
        """The process that visits only `timesteps` (ascending): index i of the result stands for `timesteps[i]`."""
        kept = self.alphas_cumprod[timesteps]
        return NoiseSchedule(1.0 - kept / np.append(1.0, kept[:-1]))


def spaced_timesteps(total: int, steps: int) -> np.ndarray:
    """`steps` timesteps from 0 to `total - 1`, both included, evenly spaced and rounded; ascending int64.

    This is `space_timesteps(total, "steps")` of the official code, used with the DDPM sampler.
    """
    _check_steps(total, steps)
    stride = (total - 1) / (steps - 1) if steps > 1 else 1.0
    # Python's rounding (half to even) of a running sum, as in the reference.
    return np.array([round(i * stride) for i in range(steps)], dtype=np.int64)


def strided_timesteps(total: int, steps: int) -> np.ndarray:
    """`steps` timesteps from 0 at a whole stride (`space_timesteps(total, "ddimN")`); ascending int64."""
    _check_steps(total, steps)
    return np.arange(steps, dtype=np.int64) * (total // steps)


def _check_steps(total: int, steps: int) -> None:
    if not 1 <= steps <= total:
        raise InputError(f"the number of sampling steps must be between 1 and {total}, not {steps}")
