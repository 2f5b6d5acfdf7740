"""The objective of U-ViT."""

from latent_diffusion.objectives import NoisePrediction, Objective
from latent_diffusion.schedules import NoiseSchedule


def make_objective() -> Objective:
    """Noise prediction over 1000 scaled-linear steps, counted from 1 (`train_t2i_discrete.py`: `LSimple`)."""
    return NoisePrediction(NoiseSchedule.scaled_linear(), first_timestep=1)
