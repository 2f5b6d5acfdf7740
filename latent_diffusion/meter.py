"""What training measures between two log lines: mean losses over steps and processes, and rates."""

import contextlib
import itertools
import statistics
import time
from collections import deque
from collections.abc import Iterator

import paddle

# Steps at the beginning that are slower than the others, and how many of the last ones make up the steady rate.
FIRST_STEPS, STEADY_STEPS = 5, 1000


class Meter:
    """Collects the losses of micro-batches; `read` gives means over all processes and starts anew.

    Args:
        samples_per_step: samples of one optimizer step, over all processes.
        batches_per_step: micro-batches of one optimizer step, on each process.
    """

    def __init__(self, samples_per_step: int, batches_per_step: int = 1):
        self.samples_per_step, self.batches_per_step = samples_per_step, batches_per_step
        self._is_paused = False
        # When steps ended, on a clock that no reading sets back.
        self._step_ends: deque[float] = deque(maxlen=STEADY_STEPS)
        self._steps = 0
        self._seconds = self._seconds_before = 0.0
        self._since = time.perf_counter()
        self.start()

    def start(self) -> None:
        """Forgets what was added; the clock runs from here, or stays paused."""
        self._sums: dict[str, paddle.Tensor] = {}
        self._pending: list[dict[str, paddle.Tensor]] = []
        self._batches = self._timed_batches = 0
        self._seconds_before += self._elapsed()
        self._seconds = 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training, or slower: the clock does not run, and rates are of the other steps.

        It may hold for several steps, over readings and over further pauses.
        """
        if self._is_paused:
            yield
            return
        self._seconds = self._elapsed()
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self._since = time.perf_counter()

    def _elapsed(self) -> float:
        """Seconds that the clock has run."""
        return self._seconds if self._is_paused else self._seconds + time.perf_counter() - self._since

    def add(self, terms: dict[str, paddle.Tensor]) -> None:
        """Adds the mean loss terms, scalars, of one micro-batch. They stay on the device: nothing waits for them."""
        self._pending.append({name: value.detach() for name, value in terms.items()})
        self._timed_batches += not self._is_paused

    def end_step(self, made: bool = True) -> None:
        """Ends a step; the losses of one that was left out do not count, its time does."""
        for terms in self._pending if made else []:
            for name, value in terms.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            self._batches += 1
        self._pending.clear()
        self._steps += 1
        if self._steps >= FIRST_STEPS:
            self._step_ends.append(self._seconds_before + self._elapsed())

    def steady_rate(self) -> float | None:
        """Samples per second, over all processes, at the median duration of the last steps; pauses do not count.

        None where there were only the first few steps.
        """
        seconds = [end - start for start, end in itertools.pairwise(self._step_ends)]
        return self.samples_per_step / statistics.median(seconds) if seconds else None

    def read(self) -> dict[str, float]:
        """Means of the terms, "samples_per_second" and "steps_per_second" since the last reading.

        There are no rates where all micro-batches came while the clock was paused, and no means where all steps were
        left out. All processes call it together, after at least one step.
        """
        means = self._means()
        steps, seconds = self._timed_batches / self.batches_per_step, self._elapsed()
        self.start()
        if not steps:
            return means
        return means | {
            "samples_per_second": steps * self.samples_per_step / seconds,
            "steps_per_second": steps / seconds,
        }

    def _means(self) -> dict[str, float]:
        names = sorted(self._sums)
        if not names:
            return {}
        sums = paddle.stack([self._sums[name].astype("float32") for name in names])
        world_size = paddle.distributed.get_world_size()
        if world_size > 1:
            paddle.distributed.all_reduce(sums)
        return {
            name: float(value) / (self._batches * world_size) for name, value in zip(names, sums.numpy(), strict=True)
        }
