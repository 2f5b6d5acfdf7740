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
from .step_guard import StepGuard, squared_gradient_norm


class StepCallback(TrainerCallback):
    """Before an optimizer step: whether it is to be made; after it: the average.

    Args:
        guard: says whether; it is also what can end the run.
        meter: of the losses.
        ema: the average, or None.

    Attributes:
        norm: of the gradient over all parameters and processes, None where it is not known.
    """

    def __init__(self, guard: StepGuard, meter: Meter, ema: EMA | None):
        self.guard, self.meter, self.ema = guard, meter, ema
        self.norm: float | None = None

    def on_optimizer_begin(self, args, state, control, optimizer=None, scaler=None, **kwargs):
        step = state.global_step + 1
        if scaler is None:
            made = self.guard.allows(step, _squared_gradient_norm(args, optimizer))
            self.norm = self.guard.norm
        else:
            # A scaler leaves out steps of its own, and looks for a scale at which gradients are finite. With sharding
            # it reduces them later: here they are not the ones that are used.
            made = self.guard.allows(step, None)
            if step % args.logging_steps == 0 and not args.sharding:
                self.norm = float(_squared_gradient_norm(args, optimizer)) ** 0.5 / float(scaler._scale)
        self.meter.end_step(made)
        if not made:
            optimizer.clear_grad(set_to_zero=False)  # the optimizer passes over parameters without a gradient

    def on_optimizer_end(self, args, state, control, optimizer=None, **kwargs):
        if self.ema and not self.guard.skipped:
            self.ema.update(state.global_step + 1, _master_weights(optimizer))

    def on_step_end(self, args, state, control, **kwargs):
        if self.guard.should_stop:
            control.should_training_stop = True


class StartCallback(TrainerCallback):
    """Calls a function when all that training begins with has been loaded."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_train_begin(self, args, state, control, **kwargs):
        self.function()


def _squared_gradient_norm(args, optimizer) -> paddle.Tensor:
    square = squared_gradient_norm(_owned(optimizer))
    if args.sharding and args.sharding_parallel_degree > 1:
        # Each rank holds the reduced gradient of its own parameters only.
        from paddle.distributed import fleet

        group = fleet.get_hybrid_communicate_group().get_sharding_parallel_group()
        paddle.distributed.all_reduce(square, group=group)
    return square


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
        if not state.is_world_process_zero or "global_step" not in logs:
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
        due: `due(step, last_step)` says whether there are images after a step.
        ema: the average, or None to draw with the raw weights.
        visualdl: the callback that holds VisualDL's writer.
    """

    def __init__(
        self,
        draw: Callable[[paddle.nn.Layer], dict[str, np.ndarray]],
        due: Callable[[int, int], bool],
        ema: EMA | None,
        visualdl: VisualDLCallback,
    ):
        self.draw, self.due, self.ema, self.visualdl = draw, due, ema, visualdl
        self.failed = False

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.failed or not state.is_world_process_zero or not self.due(state.global_step, state.max_steps):
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
