"""The losses that the networks are trained on, in PyTorch: as `gaussian_diffusion.py` of facebookresearch/DiT."""

import math

import numpy as np
import torch


class NoisePrediction:
    """MSE of the noise, 1000 steps with roots of betas linear; timesteps count from 1 (baofff/U-ViT, `LSimple`)."""

    first_timestep = 1

    def __init__(self, device):
        betas = self.betas()
        kept = np.cumprod(1 - betas)
        kept_before = np.append(1.0, kept[:-1])
        variance = betas * (1 - kept_before) / (1 - kept)
        columns = {
            "signal": np.sqrt(kept),
            "noise": np.sqrt(1 - kept),
            "recip_signal": np.sqrt(1 / kept),
            "recip_noise": np.sqrt(1 / kept - 1),
            "mean_x0": betas * np.sqrt(kept_before) / (1 - kept),
            "mean_xt": (1 - kept_before) * np.sqrt(1 - betas) / (1 - kept),
            "min_log": np.log(np.append(variance[1], variance[1:])),
            "max_log": np.log(betas),
        }
        self.columns = {name: torch.tensor(v, dtype=torch.float32, device=device) for name, v in columns.items()}

    @staticmethod
    def betas():
        return np.linspace(0.00085**0.5, 0.0120**0.5, 1000) ** 2

    def at(self, name, t):
        """A column of the schedule at timesteps [B]: [B, 1, 1, 1]."""
        return self.columns[name][t - self.first_timestep].reshape(-1, 1, 1, 1)

    def q_sample(self, latents, t, noise):
        return self.at("signal", t) * latents + self.at("noise", t) * noise

    def loss(self, denoise, latents, t, noise):
        """The mean loss of latents [B, C, H, W]; `denoise(x_t, t)` is the network with its condition."""
        return ((noise - denoise(self.q_sample(latents, t, noise), t).float()) ** 2).mean()


class LearnedRangeDDPM(NoisePrediction):
    """MSE of the noise plus the variational bound that trains the variance, 1000 linear steps from 0 (DiT)."""

    first_timestep = 0

    @staticmethod
    def betas():
        return np.linspace(1e-4, 0.02, 1000)

    def loss(self, denoise, latents, t, noise):
        x_t = self.q_sample(latents, t, noise)
        eps, values = denoise(x_t, t).float().chunk(2, dim=1)
        return ((noise - eps) ** 2).mean() + self.variational_bound(latents, x_t, t, eps.detach(), values).mean()

    def variational_bound(self, latents, x_t, t, eps, values):
        """Bits per dimension [B]."""
        at = {name: self.at(name, t) for name in self.columns}
        fraction = (values + 1) / 2
        log_variance = fraction * at["max_log"] + (1 - fraction) * at["min_log"]
        mean = at["mean_x0"] * (at["recip_signal"] * x_t - at["recip_noise"] * eps) + at["mean_xt"] * x_t
        true_mean = at["mean_x0"] * latents + at["mean_xt"] * x_t
        kl = normal_kl(true_mean, at["min_log"], mean, log_variance).flatten(1).mean(1)
        nll = -discretized_log_likelihood(latents, mean, 0.5 * log_variance).flatten(1).mean(1)
        return torch.where(t == 0, nll, kl) / math.log(2.0)


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def normal_cdf(x):
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x, mean, log_scale):
    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    plus = normal_cdf(inverse_scale * (centered + 1 / 255))
    minus = normal_cdf(inverse_scale * (centered - 1 / 255))

    def log(probability):
        return torch.log(probability.clamp(min=1e-12))

    inside = torch.where(x > 0.999, log(1.0 - minus), log(plus - minus))
    return torch.where(x < -0.999, log(plus), inside)
