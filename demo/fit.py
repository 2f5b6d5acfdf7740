"""The training loop of what the demos need beside what they are about: an autoencoder, and a pipeline to fine-tune."""

from collections.abc import Callable
from typing import Any

import paddle

from latent_diffusion.progress import progress


def fit(
    network: paddle.nn.Layer,
    next_loss: Callable[[], paddle.Tensor],
    steps: int,
    peak_learning_rate: float,
    rising: float,
    description: str,
    **adam: Any,
) -> None:
    """Adam with a learning rate that rises and falls once (L. Smith and N. Topin, arXiv 1708.07120).

    Args:
        network: its parameters are trained.
        next_loss: computes the loss of the next batch.
        steps: of the optimizer.
        peak_learning_rate: the highest.
        rising: share of the steps until then.
        description: of the progress bar.
        adam: further settings of `paddle.optimizer.Adam`.
    """
    schedule = paddle.optimizer.lr.OneCycleLR(peak_learning_rate, total_steps=steps, phase_pct=rising)
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    optimizer = paddle.optimizer.Adam(schedule, parameters=network.parameters(), grad_clip=clip, **adam)
    with progress(total=steps, desc=description, unit="step") as bar:
        for step in range(1, steps + 1):
            loss = next_loss()
            loss.backward()
            optimizer.step()
            optimizer.clear_grad(set_to_zero=False)
            schedule.step()
            if step % 50 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            bar.update()
