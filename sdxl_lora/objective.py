"""The objective of Stable Diffusion XL: noise or velocity, with the options of diffusers' script."""

from enum import Enum

import numpy as np
import paddle

from latent_diffusion.objectives import Denoiser, NoisePrediction, mean_flat
from latent_diffusion.schedules import NoiseSchedule


class Prediction(Enum):
    """What the network predicts; the values are those of schedulers' `prediction_type`."""

    EPSILON = "epsilon"
    VELOCITY = "v_prediction"


class WeightedPrediction(NoisePrediction):
    """Mean squared error of the noise or of the velocity, over timesteps 0 to T - 1.

    Reference: `train_text_to_image_lora_sdxl.py` of huggingface/diffusers 0.32.

    Args:
        schedule: of T steps.
        prediction: noise, or `signal * noise - sigma * latents` (T. Salimans and J. Ho, arXiv 2202.00512).
        snr_gamma: weights timesteps by min(SNR, gamma) / SNR, for the velocity / (SNR + 1) (T. Hang et al.,
            arXiv 2303.09556); None for equal weights.
        noise_offset: standard deviation of what is added to the noise, the same at all positions of a channel.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction = Prediction.EPSILON,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ):
        self.prediction, self.snr_gamma, self.noise_offset = prediction, snr_gamma, noise_offset
        super().__init__(schedule)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        drawn = super().draw(rng, shape)
        if self.noise_offset:
            drawn["noise"] += np.float32(self.noise_offset) * rng.standard_normal((shape[0], 1, 1), dtype=np.float32)
        return drawn

    def losses(
        self, denoise: Denoiser, latents: paddle.Tensor, t: paddle.Tensor, noise: paddle.Tensor
    ) -> dict[str, paddle.Tensor]:
        at = self._at(t)
        predicted = denoise(at["signal"] * latents + at["noise"] * noise, t).astype("float32")
        target = noise if self.prediction is Prediction.EPSILON else at["signal"] * noise - at["noise"] * latents
        return {"loss": mean_flat((target - predicted) ** 2) * at["weight"].flatten()}

    def _schedule_columns(self) -> dict[str, np.ndarray]:
        return super()._schedule_columns() | {"weight": self._weights()}

    def _weights(self) -> np.ndarray:
        acp = self.schedule.alphas_cumprod
        if self.snr_gamma is None:
            return np.ones_like(acp)
        # With a signal that ends at zero its inverse has no bound.
        noise_ratio = np.divide(1.0 - acp, acp, out=np.full_like(acp, np.inf), where=acp > 0)
        weights = np.minimum(1.0, self.snr_gamma * noise_ratio)
        # Of the velocity, SNR / (SNR + 1) of it.
        return weights if self.prediction is Prediction.EPSILON else weights * acp
