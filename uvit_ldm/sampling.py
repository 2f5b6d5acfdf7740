"""Sampling: encoded prompts and a seed in, scaled latents out."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import paddle

from latent_diffusion.errors import InputError
from latent_diffusion.guidance import ALL_STEPS, check_interval, scale_at
from latent_diffusion.runtime import import_paddlenlp
from latent_diffusion.sampling import draw_noise, evaluating, sample_generators
from latent_diffusion.schedules import NoiseSchedule

from .dpm_solver import DPMSolver
from .modeling import UViT

# The last of the timesteps that the network was trained on, from 1.
TRAIN_STEPS = 1000

# Guided predictions of the noise in x [B, C, H, W] at a timestep in [1, 1000].
Denoise = Callable[[paddle.Tensor, float], paddle.Tensor]


class Sampler(Protocol):
    """One way to walk from noise to a latent, in `steps` calls of the network; `name` is what `make_sampler` takes."""

    name: str
    steps: int

    def sample(self, denoise: Denoise, latents: paddle.Tensor, on_step: Callable[[], object] | None = None):
        """Latents float32 [B, C, H, W] that standard normal `latents` become; `on_step` is called after each call."""


class DDIM:
    """DDIM (eta 0) as the exported pipeline runs it."""

    name = "ddim"

    def __init__(self, schedule: NoiseSchedule, steps: int):
        self.scheduler, self.steps = ddim_scheduler(schedule), steps

    def sample(self, denoise: Denoise, latents: paddle.Tensor, on_step: Callable[[], object] | None = None):
        self.scheduler.set_timesteps(self.steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(denoise(latents, int(t)), t, latents).prev_sample
            if on_step:
                on_step()
        return latents


def ddim_scheduler(schedule: NoiseSchedule | None = None) -> Any:
    """ppdiffusers' `DDIMScheduler` whose timesteps are U-ViT's: n of the network, 1 to 1000, where others count from 0.

    The class counts entries of its table from 0, so there is one entry more, for n = 0, which the network never sees.
    That has half the noise of n = 1, not none: solvers that end there divide by its noise.
    """
    import_paddlenlp()
    from ppdiffusers.schedulers.scheduling_ddim import DDIMScheduler

    schedule = schedule or NoiseSchedule.scaled_linear()
    signal = np.concatenate([[1 - schedule.betas[0] / 2], schedule.alphas_cumprod])
    betas = 1.0 - signal / np.concatenate([[1.0], signal[:-1]])
    return DDIMScheduler(
        num_train_timesteps=len(betas), trained_betas=betas.tolist(), clip_sample=False, steps_offset=1
    )


def make_sampler(name: str, steps: int) -> Sampler:
    """A sampler for a network trained by `make_objective`.

    Args:
        name: "ddim", or "dpm-solver++": the reference's, of third order (50 steps in its evaluation).
        steps: calls of the network, from 1 to 1000. DDIM spaces them by `1001 // steps` timesteps from 1 on, as the
            pipeline does: the first of 50 is 981, that of 600 is 600.

    Raises:
        InputError: no such sampler, or a number of steps that cannot be.
    """
    samplers = {sampler.name: sampler for sampler in (DDIM, DPMSolver)}
    if name not in samplers:
        raise InputError(f"unknown sampler {name!r}; known are {', '.join(samplers)}")
    schedule = NoiseSchedule.scaled_linear()
    if not 1 <= steps <= len(schedule):
        raise InputError(f"the number of sampling steps must be between 1 and {len(schedule)}, not {steps}")
    return samplers[name](schedule, steps)


@paddle.no_grad()
def sample_latents(
    model: UViT,
    contexts: np.ndarray,
    empty_context: np.ndarray,
    sampler: Sampler,
    guidance_scale: float = 7.5,
    seed: int | Sequence[np.random.Generator] = 0,
    on_step: Callable[[], object] | None = None,
    guidance_interval: tuple[float, float] = ALL_STEPS,
) -> paddle.Tensor:
    """Samples one latent for each encoded prompt; divide by the scaling factor before decoding.

    Args:
        model: the backbone; it runs in eval mode and is left in the mode it was in.
        contexts: float32 [B, L, D].
        empty_context: of the empty prompt, float32 [L, D].
        sampler: from `make_sampler`.
        guidance_scale: g of `empty + g (prompt - empty)`, on all channels, as pipelines count; 1 for none, which takes
            half the time. What the reference calls scale s is g = 1 + s.
        seed: of the noise: sample i draws from generator i of `sample_generators(seed, range(B))`. Or one generator a
            prompt.
        on_step: called after each step.
        guidance_interval: guide at the timesteps n with `n / 1000` in [low, high] only. The others take half the time.

    Returns:
        Scaled latents, float32 [B, C, H, W].

    Raises:
        InputError: the contexts are not of the network's shape, the seed is negative, or there is no such interval.
    """
    check_interval(guidance_interval)
    shape = model.config.context_shape
    if contexts.shape[1:] != shape or empty_context.shape != shape or not len(contexts):
        raise InputError(
            f"the encoded prompts are {list(contexts.shape)} and {list(empty_context.shape)}, the network takes "
            f"[B, {shape[0]}, {shape[1]}] and {list(shape)}"
        )
    generators = sample_generators(seed, range(len(contexts))) if isinstance(seed, int) else seed
    prompts = paddle.to_tensor(contexts)
    empty = paddle.to_tensor(empty_context).expand(prompts.shape)
    both = paddle.concat([empty, prompts])

    def denoise(x: paddle.Tensor, t: float) -> paddle.Tensor:
        scale = scale_at(t, TRAIN_STEPS, guidance_scale, guidance_interval)
        if scale == 1:
            return model(x, paddle.full([x.shape[0]], t, "float32"), prompts).astype("float32")
        # One pass over both halves, in the order of the pipeline.
        out = model(paddle.concat([x, x]), paddle.full([2 * x.shape[0]], t, "float32"), both).astype("float32")
        without, with_prompt = out.chunk(2)
        return without + scale * (with_prompt - without)

    with evaluating(model):
        return sampler.sample(denoise, draw_noise(generators, model.config.latent_shape), on_step)
