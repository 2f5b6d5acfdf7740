"""What happens beside the optimizer steps: averaging, progress, images."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
from paddlenlp.trainer import TrainerCallback
from paddlenlp.trainer.integrations import VisualDLCallback
from tqdm import tqdm

from .ema import EMA
from .meter import Meter
from .profiling import StepProfiler
from .progress import training_line, write_line


class EMACallback(TrainerCallback):
    """Averages the weights after every optimizer step."""

    def __init__(self, ema: EMA):
        self.ema = ema

    def on_optimizer_end(self, args, state, control, optimizer=None, **kwargs):
        self.ema.update(state.global_step + 1, _master_weights(optimizer))


class GradientNormCallback(TrainerCallback):
    """Measures the norm of the gradient, over all parameters and processes, at the steps that are logged."""

    def __init__(self):
        self.value: float | None = None

    def on_optimizer_begin(self, args, state, control, optimizer=None, scaler=None, **kwargs):
        # With a scaler, sharding reduces gradients later, inside its step: here they are not the ones that are used.
        if (state.global_step + 1) % args.logging_steps or (scaler is not None and args.sharding):
            return
        gradients = [getattr(p, "main_grad", None) if p.grad is None else p.grad for p in _owned(optimizer)]
        squares = [(g.astype("float32") ** 2).sum() for g in gradients if g is not None]
        total = paddle.add_n(squares) if squares else paddle.zeros([])
        if args.sharding and args.sharding_parallel_degree > 1:
            # Each rank holds the reduced gradient of its own parameters only.
            from paddle.distributed import fleet

            group = fleet.get_hybrid_communicate_group().get_sharding_parallel_group()
            paddle.distributed.all_reduce(total, group=group)
        scale = float(scaler._scale) if scaler is not None else 1.0
        self.value = float(total) ** 0.5 / scale


def _master_weights(optimizer) -> dict[str, paddle.Tensor]:
    """Float32 copies that the optimizer keeps of half-precision weights, by parameter name."""
    while hasattr(optimizer, "_inner_opt"):
        optimizer = optimizer._inner_opt
    return getattr(optimizer, "_master_weights", {})


def _owned(optimizer) -> list[paddle.Tensor]:
    """Parameters whose gradient this rank holds in full."""
    while hasattr(optimizer, "_inner_opt"):
        if hasattr(optimizer, "_rank2params"):
            return optimizer._rank2params[optimizer._sharding_rank]
        optimizer = optimizer._inner_opt
    return optimizer._parameter_list


class ProgressCallback(TrainerCallback):
    """A bar with rate and remaining time on a terminal, plain lines elsewhere."""

    def __init__(self):
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="train",
                unit="step",
                disable=args.disable_tqdm,
                file=sys.stderr,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in logs:
            return
        line = training_line(state.global_step, state.max_steps, logs)
        if args.disable_tqdm:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class ProfilingCallback(TrainerCallback):
    """Profiles a few steps in the first process, see `StepProfiler`."""

    def __init__(self, meter: Meter):
        self.meter = meter
        self.profiler: StepProfiler | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            self.profiler = StepProfiler(folder, state.global_step, state.max_steps, self.meter, write_line)

    def on_step_end(self, args, state, control, **kwargs):
        if self.profiler:
            self.profiler.after_step(state.global_step)


class EvaluationCallback(TrainerCallback):
    """Has the Trainer evaluate after every step that `due(step, last_step)` says."""

    def __init__(self, due: Callable[[int, int], bool]):
        self.due = due

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = self.due(state.global_step, state.max_steps)


class ImageLoggingCallback(TrainerCallback):
    """Sends images drawn with the averaged weights to VisualDL; where that fails it warns and stops doing so.

    Args:
        draw: `draw(model)` returns a dict of names and images uint8 [H, W, 3]. It must not touch Paddle's generators.
        every: steps between images.
        ema: the average, or None to draw with the raw weights.
        visualdl: the callback that holds VisualDL's writer.
    """

    def __init__(
        self,
        draw: Callable[[paddle.nn.Layer], dict[str, np.ndarray]],
        every: int,
        ema: EMA | None,
        visualdl: VisualDLCallback,
    ):
        self.draw, self.every, self.ema, self.visualdl = draw, every, ema, visualdl
        self.failed = False

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.failed or state.global_step % self.every or not state.is_world_process_zero:
            return
        try:
            self._log(state.global_step, model)
        except Exception as error:  # out of memory, say: pictures are not worth the run
            self.failed = True
            print(f"warning: no more images are logged: {type(error).__name__}: {error}", file=sys.stderr)

    def _log(self, step: int, model: paddle.nn.Layer) -> None:
        with self.ema.applied() if self.ema else contextlib.nullcontext(model) as averaged:
            images = self.draw(averaged)
        for name, image in images.items():
            self.visualdl.vdl_writer.add_image(f"samples/{name}", image, step)
