"""The batch that the programs of a training step in Paddle train on."""

import numpy as np
import paddle

from latent_diffusion.objectives import Objective
from uvit_ldm.configuration import UViTConfig


def random_batch(config, objective: Objective, count: int) -> dict[str, paddle.Tensor]:
    """Latents, what the objective draws for them, and as "condition" labels or encoded prompts."""
    rng = np.random.default_rng(0)
    draws = [objective.draw(rng, config.latent_shape) for _ in range(count)]
    batch = {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}
    batch["latents"] = rng.standard_normal([count, *config.latent_shape], dtype=np.float32)
    if isinstance(config, UViTConfig):
        batch["condition"] = rng.standard_normal([count, *config.context_shape], dtype=np.float32)
    else:
        batch["condition"] = rng.integers(config.num_classes, size=count)
    return {name: paddle.to_tensor(values) for name, values in batch.items()}
