"""What is looked at in every optimizer step: numbers that are not finite, a loss that leaps, requests to stop."""

import math
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import paddle

from . import distributed
from .errors import InputError
from .features import TrainingStream
from .loader import StreamBatchSampler
from .stopping import StopRequest

# A run that skips more steps than this one after another has diverged.
SKIPS_IN_A_ROW = 10

# Images of a step that a message names.
IMAGES_NAMED = 16

# Steps between two comparisons of the weights of all processes.
AGREEMENT_STEPS = 1000


def squared_gradient_norm(parameters: Iterable[paddle.Tensor]) -> paddle.Tensor:
    """The square of the Euclidean norm of all gradients together, float32 scalar; not finite if one of them is not.

    Args:
        parameters: those without a gradient count as 0.
    """
    gradients = [getattr(p, "main_grad", None) if p.grad is None else p.grad for p in parameters]
    squares = [paddle._C_ops.squared_l2_norm(g.astype("float32")) for g in gradients if g is not None]
    return paddle.add_n([square.reshape([]) for square in squares]) if squares else paddle.zeros([])


class SpikeDetector:
    """Tells losses that are far above those before them: `FACTOR` standard deviations above a moving mean."""

    # Single batches of diffusion training differ by about a tenth of the mean.
    FACTOR, MEMORY, FIRST = 8.0, 0.99, 200

    def __init__(self):
        self._count, self._mean, self._variance = 0, 0.0, 0.0

    def look(self, loss: float) -> str | None:
        """Says how far this loss is above those before it, if it is a spike; it counts among those before the next."""
        deviation = math.sqrt(self._variance)
        limit = self._mean + self.FACTOR * deviation
        spike = None
        if self._count >= self.FIRST and loss > limit:
            spike = f"{loss:.4g}, before it {self._mean:.4g} +- {deviation:.2g}"
        self._count += 1
        weight = max(1 / self._count, 1 - self.MEMORY)
        # What a spike itself adds is bounded, so that a second one is seen as well.
        change = (limit if spike else loss) - self._mean
        self._mean += weight * change
        self._variance = (1 - weight) * (self._variance + weight * change**2)
        return spike


class StepGuard:
    """Looks at each step before the optimizer makes it. All processes of a run do so together.

    Args:
        model: the network.
        stream: of the samples.
        sampler: the positions of the batches in it, which are trained on in this order.
        on_nonfinite: end the run at a step whose loss or gradient is not finite, or leave that step out.
        stop: asks for an end of the run.
        say: takes the lines that the log gets.
        advice: gives what a message about a run that has diverged ends with.
        agreement_steps: between two comparisons of the weights of all processes; None where none has them whole.

    Attributes:
        norm: of the gradient of the last step, None where it is not known.
        skipped: whether the last step was left out.
        should_stop: whether the run is to end after the last step.
    """

    def __init__(
        self,
        model: paddle.nn.Layer,
        stream: TrainingStream,
        sampler: StreamBatchSampler,
        on_nonfinite: Literal["stop", "skip"],
        stop: StopRequest,
        say: Callable[[str], None],
        advice: Callable[[], str],
        agreement_steps: int | None = AGREEMENT_STEPS,
    ):
        self._model, self._stream = model, stream
        self._skips, self._stop, self._say, self._advice = on_nonfinite == "skip", stop, say, advice
        self._micro_batches: list[tuple[list[int], paddle.Tensor]] = []
        self._spikes, self._skips_in_a_row = SpikeDetector(), 0
        self._agreement_steps = agreement_steps
        self.norm: float | None = None
        self.skipped = self.should_stop = False
        self.begin(sampler)

    def begin(self, sampler: StreamBatchSampler) -> None:
        """The next losses are those of the batches of this sampler."""
        self._batches = iter(sampler)

    def add(self, losses: paddle.Tensor) -> None:
        """Takes the losses [B] of the next batch of the sampler."""
        self._micro_batches.append((next(self._batches), losses.detach()))

    def allows(self, step: int, squared_norm: paddle.Tensor | None) -> bool:
        """Whether the optimizer is to make this step, whose batches were added.

        Args:
            step: its number, from 1.
            squared_norm: of the gradient, over all processes, see `squared_gradient_norm`; None where it is not known.

        Raises:
            InputError: on all processes, where a number is not finite and the run is to end; the weights of processes
                differ.
        """
        loss, self.should_stop, self.norm = self._report(squared_norm)
        finite = math.isfinite(loss) and (self.norm is None or math.isfinite(self.norm))
        self.skipped = not finite
        if not finite:
            self._not_finite(step, "the loss" if not math.isfinite(loss) else "the gradient")
        elif spike := self._spikes.look(loss):
            self._say_spike(step, spike)
        self._skips_in_a_row = 0 if finite else self._skips_in_a_row + 1
        self._micro_batches.clear()
        if self._agreement_steps and step % self._agreement_steps == 0:
            distributed.check_agreement(self._model, f"at step {step}")
        return finite

    def check_weights(self, step: int) -> None:
        """Raises `InputError` on all processes where weights are not worth saving.

        That is where one is not finite, or those of the processes differ.
        """
        distributed.check_agreement(self._model, f"at step {step}")
        if not all(bool(paddle.isfinite(p).all()) for p in self._model.parameters()):
            raise InputError(
                f"a weight is not finite at step {step}; training stops and saves nothing, {self._advice()}"
            )

    def _report(self, squared_norm: paddle.Tensor | None) -> tuple[float, bool, float | None]:
        """The mean loss of the step, whether any process has been asked to stop, and the norm of the gradient."""
        loss = paddle.stack([losses.astype("float32").mean() for _, losses in self._micro_batches]).mean()
        shared = paddle.stack([loss, paddle.full([], float(self._stop.reason is not None))])
        world_size = paddle.distributed.get_world_size()
        if world_size > 1:
            paddle.distributed.all_reduce(shared)
        # One transfer from the device.
        numbers = shared if squared_norm is None else paddle.concat([shared, squared_norm.reshape([1])])
        loss, requests, *square = numbers.tolist()
        return loss / world_size, requests > 0, square[0] ** 0.5 if square else None

    def _say_spike(self, step: int, spike: str) -> None:
        positions, losses = self._losses()
        worst = self._image(positions[losses.argmax()])
        found = distributed.gather(f"image {worst}{self._process()} has the loss {losses.max():.4g}")
        self._say(f"loss spike at step {step}: {spike}; {', '.join(found)}")

    def _not_finite(self, step: int, what: str) -> None:
        positions, losses = self._losses()
        bad = positions[~np.isfinite(losses)]
        found = [text for text in distributed.gather(self._images("loss of image", bad)) if text]
        found = found or distributed.gather(self._images("image", positions))
        if (parameter := self._parameter()) is not None:
            found.append(f"first in the gradient of {parameter}")
        text = f"{what} is not finite at step {step} ({'; '.join(found)})"
        if not self._skips:
            raise InputError(f"{text}; training stops and saves nothing, {self._advice()}, or --on_nonfinite skip")
        if self._skips_in_a_row >= SKIPS_IN_A_ROW:
            raise InputError(
                f"{text}, as in the {SKIPS_IN_A_ROW} steps before it; training stops and saves nothing, "
                f"{self._advice()}"
            )
        self._say(f"step {step} is left out: {text}")

    def _losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the stream and losses, float32, of this process's samples of the step."""
        positions, losses = zip(*self._micro_batches, strict=True)
        return np.concatenate(positions), np.concatenate([each.astype("float32").numpy() for each in losses])

    def _parameter(self) -> str | None:
        """The first parameter whose gradient is not finite."""
        for name, p in self._model.named_parameters():
            gradient = getattr(p, "main_grad", None) if p.grad is None else p.grad
            if gradient is not None and not bool(paddle.isfinite(gradient.astype("float32")).all()):
                return name
        return None

    def _images(self, noun: str, positions: np.ndarray) -> str:
        """Names the images at these positions; an empty text for none."""
        if not len(positions):
            return ""
        named = ", ".join(str(self._image(position)) for position in positions[:IMAGES_NAMED])
        more = f" and {len(positions) - IMAGES_NAMED} more" if len(positions) > IMAGES_NAMED else ""
        return f"{noun} {named}{more}{self._process()}"

    def _image(self, position: int) -> int:
        return self._stream.locate(int(position))[1]

    def _process(self) -> str:
        return f" of process {paddle.distributed.get_rank()}" if paddle.distributed.get_world_size() > 1 else ""
