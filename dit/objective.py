"""What DiT is trained on: the one place that names the objective."""

from latent_diffusion.objectives import LearnedRangeDDPM, Objective
from latent_diffusion.schedules import NoiseSchedule


def make_objective() -> Objective:
    """Noise prediction with a learned variance over 1000 linear steps (DiT paper, section 3.1 and appendix)."""
    return LearnedRangeDDPM(NoiseSchedule.linear())
