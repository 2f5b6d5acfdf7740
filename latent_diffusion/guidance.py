"""Where along the way from noise to image classifier-free guidance acts.

T. Kynkaanniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
Models", arXiv 2404.07724. Intervals are counted in timesteps: 0 is the image, 1 the noise. Needs no Paddle.
"""

from .errors import InputError

ALL_STEPS = (0.0, 1.0)


def check_interval(interval: tuple[float, float]) -> None:
    """Raises `InputError` unless `interval` is (low, high) with 0 <= low < high <= 1."""
    low, high = interval
    if not 0 <= low < high <= 1:
        raise InputError(
            f"the guidance interval {low:g} to {high:g} must have 0 <= low < high <= 1: shares of the training "
            "timesteps, 0 at the image, 1 at the noise"
        )


def scale_at(t: float, train_steps: int, scale: float, interval: tuple[float, float]) -> float:
    """The guidance scale at timestep `t`: `scale` where `t / train_steps` lies in [low, high], elsewhere 1."""
    low, high = interval
    return scale if low <= t / train_steps <= high else 1.0
