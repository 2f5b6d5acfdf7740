"""Evaluation during training: the Frechet distance of samples to a reference, and the best weights so far.

<folder>/best/
    model_state.pdparams  ema_state.pdparams  config.json    as in a checkpoint
    evaluation.json    step, distance ("fid") and what that depends on
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from .. import checkpoint, distributed
from ..ema import EMA
from ..errors import InputError, NotFiniteError
from ..extraction import batches
from ..files import new_folder, write_json
from ..images import Crop
from ..progress import progress
from .extractor import Extractor
from .extractors import make_extractor
from .flags import EvaluationFlags
from .report import distance_name, few_images, frechet
from .side import FeatureWork, Side, open_side

# Folder of the reference's features, which are made once for all runs beside it.
CACHE = "evaluation_cache"

# Batches have the same members in every run, since a batch's size can change the last digits.
BATCH_SIZE = 32

# The same noise whatever seed a run has: distances of different runs differ by what the networks have learned.
SEED = 0


@dataclass(frozen=True)
class SampleMaker:
    """How a system makes the images that are compared with the reference.

    Attributes:
        draw: `draw(model, seed, indices)` gives the samples of these numbers, uint8 [B, H, W, 3], each a function of
            (seed, index). It must not touch Paddle's generators.
        settings: what the samples depend on beside the network, seed and number, as plain values.
        crop_to: side in pixels that images of the reference are brought to, and by which function.
    """

    draw: Callable[[paddle.nn.Layer, int, Sequence[int]], np.ndarray]
    settings: Mapping[str, int | float | str]
    crop_to: tuple[int, Crop]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the distance, None where it could not be computed, and a line that says it."""

    distance: float | None
    line: str


class TrainingEvaluation:
    """Compares a network with a reference while it is trained, and keeps the best weights; see `open_evaluation`.

    Args:
        flags: with steps and a reference.
        maker: of samples.
        extractor: of features.
        reference: its side of the comparison.

    Attributes:
        notes: what a reader of the distances should know.
    """

    def __init__(self, flags: EvaluationFlags, maker: SampleMaker, extractor: Extractor, reference: Side):
        self._every, self._count = flags.steps, flags.samples
        self._maker, self._extractor, self._reference = maker, extractor, reference
        self._folder: Path | None = None
        self._best: dict | None = None
        counts = {reference.name: reference.moments_count, "each evaluation": flags.samples}
        self.notes = [note for name, count in counts.items() for note in few_images(name, count, extractor)]

    def keep_best_in(self, folder: Path, after: int) -> None:
        """Says where `best` is kept, and takes over the one that an earlier part of the run left there.

        Args:
            folder: of the run.
            after: the step that the run goes on from; a best of a later step is about to be moved aside.

        Raises:
            InputError: its distance cannot be compared with those of this run, or something else is there.
        """
        self._folder, self._best = folder, checkpoint.read_best(folder)
        path = folder / checkpoint.BEST
        if self._best is not None and self._best["step"] > after:
            self._best = None
            return
        if self._best is None:
            if path.exists():
                raise InputError(f"{path} holds no {checkpoint.EVALUATION}: it would be replaced; move it away")
            return
        for name, value in self._settings().items():
            if (found := self._best.get(name)) != value:
                raise InputError(
                    f"{path} was chosen with {name} {found!r}, not {value!r}; give the flags as before, or move it away"
                )

    def due(self, step: int, last: int) -> bool:
        """Whether there is an evaluation after this step: every so many steps and after the last one."""
        return step % self._every == 0 or step == last

    def run(
        self, step: int, model: paddle.nn.Layer, ema: EMA | None, is_to_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Evaluates the averaged weights, or the raw ones without an average. All processes call it together.

        Where one of them is to stop, all leave the rest of the evaluation out.

        Args:
            step: how many steps the network has been trained for.
            model: with whole weights; its `config` has `save`. It is left as it was.
            ema: its average, or None.
            is_to_stop: asked between batches.

        Returns:
            What was found, to be logged by the first process; None in the others.
        """
        start = time.monotonic()
        with ema.applied() if ema else contextlib.nullcontext(model) as averaged:
            features = self._features(averaged, step, is_to_stop)
        if features is None:
            left_out = Evaluation(None, f"step {step}: the evaluation is left out, the run is to stop")
            return left_out if paddle.distributed.get_rank() == 0 else None
        found = None
        if paddle.distributed.get_rank() == 0:
            text, distance = self._judge(step, features, model, ema)
            found = Evaluation(distance, f"step {step}: {text}; {time.monotonic() - start:.1f} s")
        # The other processes would not wait for the first one for as long in the next step.
        distributed.barrier()
        return found

    def _features(self, model: paddle.nn.Layer, step: int, is_to_stop: Callable[[], bool]) -> np.ndarray | None:
        """Features of all samples, float32 [N, D], each made by one process; NaN for images that are not finite.

        None where a process is to stop.
        """
        rank, world_size = distributed.start()
        features = np.zeros((self._count, self._extractor.widths["features"]), np.float32)
        all_batches = batches(self._count, BATCH_SIZE)
        own = all_batches[rank::world_size]
        with progress(sum(map(len, own)), f"samples of step {step}", "image") as bar:
            for turn in range(math.ceil(len(all_batches) / world_size)):
                if any(distributed.gather("stop" if is_to_stop() else "")):
                    return None
                for batch in own[turn : turn + 1]:
                    features[batch.start : batch.stop] = self._features_of(model, batch)
                    bar.update(len(batch))
        return _summed(features)

    def _features_of(self, model: paddle.nn.Layer, batch: range) -> np.ndarray | float:
        try:
            images = self._maker.draw(model, SEED, batch)
        except NotFiniteError:
            return np.nan
        return self._extractor(images)["features"]

    def _judge(
        self, step: int, features: np.ndarray, model: paddle.nn.Layer, ema: EMA | None
    ) -> tuple[str, float | None]:
        """The distance in words and as a number; keeps the weights if they are the best."""
        name = distance_name(self._extractor)
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        if bad:
            # Early in training a network may diverge on some samples, and yet get better.
            return f"{name} not computed, {bad} of {self._count} samples are not finite", None
        try:
            distance = frechet(self._reference, Side("the samples", {"features": features}))
        except InputError as error:
            return f"{name} not computed, {error}", None
        text = f"{name} of {self._count} samples {distance:.5g}"
        if self._best is not None and self._best["fid"] <= distance:
            return f"{text}, best {self._best['fid']:.5g} at step {self._best['step']}", distance
        best = {"step": step, "fid": distance} | self._settings()
        try:
            with new_folder(self._folder / checkpoint.BEST, checkpoint.EVALUATION) as folder:
                checkpoint.write_weights(folder, model, ema)
                write_json(folder / checkpoint.EVALUATION, best)
        except (OSError, InputError) as error:  # a full disk, say, which must not end the run
            return f"{text}, the best so far, but it cannot be saved ({error})", distance
        self._best = best
        return f"{text}, the best so far", distance

    def _settings(self) -> dict[str, int | float | str]:
        """What a distance depends on beside the weights."""
        return {
            "samples": self._count,
            "reference": self._reference.fingerprint,
            "extractor": self._extractor.identity,
            **self._maker.settings,
        }


def _summed(array: np.ndarray) -> np.ndarray:
    """The sum over all processes of an array."""
    if paddle.distributed.get_world_size() == 1:
        return array
    distributed.barrier()  # one may draw a batch longer than collectives wait on a CPU
    tensor = paddle.to_tensor(array)
    paddle.distributed.all_reduce(tensor)
    return tensor.numpy()


def _try(reference: Side) -> None:
    """Raises `InputError` for a reference that nothing can be compared with, which would be found steps later."""
    try:
        frechet(reference, reference)
    except InputError as error:
        raise InputError(f"--eval_reference {reference.name} is of no use: {error}") from None


def open_evaluation(
    flags: EvaluationFlags, make_maker: Callable[[], SampleMaker], folder: Path
) -> TrainingEvaluation | None:
    """The evaluation that the flags ask for, with all it needs, or None. All processes of a run call it together.

    Args:
        flags: of the command.
        make_maker: gives the maker of samples.
        folder: where the features of the reference are kept, in `CACHE`.

    Raises:
        InputError: whatever is wrong with the extractor, the reference or the maker of samples.
    """
    if flags.steps is None:
        return None
    maker, extractor = make_maker(), make_extractor(flags.extractor, flags.weights)
    reference = open_side(flags.reference, extractor, FeatureWork(folder / CACHE, crop_to=maker.crop_to))
    if "features" not in reference.saved:  # whose moments are all that is compared
        reference.extract()
    if paddle.distributed.get_rank() == 0:  # which will compute the distances
        _try(reference)
    return TrainingEvaluation(flags, maker, extractor, reference)
