import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion import checkpoint
from latent_diffusion.ema import EMA
from latent_diffusion.errors import InputError, NotFiniteError
from latent_diffusion.evaluation import training
from latent_diffusion.evaluation.flags import EvaluationFlags
from latent_diffusion.evaluation.image_set import open_images
from latent_diffusion.evaluation.metrics import frechet_distance, moments
from latent_diffusion.evaluation.pixels import Pixels
from latent_diffusion.evaluation.side import Side
from latent_diffusion.evaluation.training import SampleMaker, TrainingEvaluation, open_evaluation
from latent_diffusion.images import center_crop
from latent_diffusion.weights import read_weights

SAMPLES = 70


class Config:
    def save(self, path: Path) -> None:
        path.write_text("{}")


class Net(paddle.nn.Layer):
    """Draws images of one brightness and some noise."""

    def __init__(self, brightness: float = 0.0):
        super().__init__()
        self.config = Config()
        self.brightness = self.create_parameter([1], default_initializer=paddle.nn.initializer.Constant(brightness))


@dataclass
class Draw:
    """`SampleMaker.draw` of a `Net`; notes what it was asked for."""

    asked: list = field(default_factory=list)

    def __call__(self, model: Net, seed: int, indices: range) -> np.ndarray:
        self.asked.append((seed, indices))
        level = model.brightness.item()
        if not np.isfinite(level) and 40 in indices:
            raise NotFiniteError("not finite")
        return np.stack([noise([seed, index], level if np.isfinite(level) else 0) for index in indices])


def noise(seed, brightness: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 100, (16, 16, 3)) + brightness).astype(np.uint8)


@pytest.fixture
def reference(tmp_path) -> Path:
    np.savez(tmp_path / "real.npz", arr_0=np.stack([noise(1000 + i, 50) for i in range(300)]))
    return tmp_path / "real.npz"


@pytest.fixture
def draw() -> Draw:
    return Draw()


@pytest.fixture
def make(tmp_path, reference, draw):
    """`make(samples, path, **settings)`: an evaluation every 5 steps that keeps the best of tmp_path/run."""

    def open_it(samples: int = SAMPLES, path: Path = reference, **settings: str) -> TrainingEvaluation:
        flags = EvaluationFlags(5, samples, path, "pixels", None)
        maker = SampleMaker(draw, {"sampling_steps": 3} | settings, crop_to=(16, center_crop))
        evaluation = open_evaluation(flags, lambda: maker, tmp_path)
        evaluation.keep_best_in(tmp_path / "run", after=100)
        return evaluation

    return open_it


def by_hand(reference: Path, brightness: float) -> float:
    with np.load(reference) as file:
        real = Pixels()(file["arr_0"])["features"]
    fake = Pixels()(np.stack([noise([0, i], brightness) for i in range(SAMPLES)]))["features"]
    return frechet_distance(moments(real), moments(fake))


def best(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run/best/evaluation.json").read_text())


def test_the_distance_is_that_of_the_averaged_weights(make, reference):
    evaluation, model = make(), Net(20)
    ema = EMA(model)
    model.brightness.set_value(model.brightness + 60)
    averaged, raw = evaluation.run(5, model, ema), evaluation.run(5, model, None)
    assert averaged.distance == pytest.approx(by_hand(reference, 20), rel=1e-9)
    assert raw.distance == pytest.approx(by_hand(reference, 80), rel=1e-9)
    assert model.brightness.item() == 80


def test_samples_are_drawn_in_batches_of_the_same_members(make, draw):
    make().run(5, Net(), None)
    assert draw.asked == [(0, range(32)), (0, range(32, 64)), (0, range(64, 70))]


def test_processes_share_the_batches(make, draw, monkeypatch):
    """What each has of the features, and zeros elsewhere, add up to what one process makes."""
    evaluation, model = make(), Net(20)
    whole, parts = evaluation._features(model, 5, lambda: False), []
    monkeypatch.setattr(training, "_summed", lambda array: array)
    for rank in range(2):
        draw.asked.clear()
        monkeypatch.setattr(training.distributed, "start", lambda rank=rank: (rank, 2))
        parts.append(evaluation._features(model, 5, lambda: False))
        assert [indices.start // 32 for _, indices in draw.asked] == [[0, 2], [1]][rank]
    np.testing.assert_array_equal(sum(parts), whole)


def test_the_best_weights_are_kept_and_replaced_by_better_ones_only(make, tmp_path, reference):
    evaluation = make()
    lines = [
        evaluation.run(step, Net(level), EMA(Net(level + 1))).line for step, level in ((5, 30), (10, 45), (15, 60))
    ]
    assert lines[0].startswith("step 5: Frechet distance (pixels) of 70 samples ")
    assert "the best so far; " in lines[0] and "the best so far; " in lines[1]
    assert f", best {by_hand(reference, 46):.5g} at step 10; " in lines[2]
    assert best(tmp_path) == {
        "step": 10,
        "fid": pytest.approx(by_hand(reference, 46)),
        "samples": 70,
        "reference": open_images(reference, (16, center_crop)).fingerprint,
        "extractor": "pixels",
        "sampling_steps": 3,
    }
    folder = tmp_path / "run/best"
    assert {path.name for path in folder.iterdir()} == {
        checkpoint.MODEL, checkpoint.EMA_MODEL, checkpoint.CONFIG, checkpoint.EVALUATION
    }  # fmt: skip
    assert read_weights(folder / checkpoint.MODEL)["brightness"] == 45
    assert checkpoint.checkpoints(tmp_path / "run") == []


def test_best_weights_that_cannot_be_saved_do_not_end_the_run(make, tmp_path, monkeypatch):
    evaluation = make()
    evaluation.run(5, Net(30), None)

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_weights", fail)
        line = evaluation.run(10, Net(46), None).line
    assert "the best so far, but it cannot be saved ([Errno 28] No space left on device" in line
    assert best(tmp_path)["step"] == 5
    assert "the best so far; " in evaluation.run(15, Net(45), None).line and best(tmp_path)["step"] == 15


def test_the_best_of_a_later_step_does_not_count(make, tmp_path):
    make().run(10, Net(46), None)
    evaluation = make()
    evaluation.keep_best_in(tmp_path / "run", after=9)
    assert "the best so far; " in evaluation.run(15, Net(30), None).line


def test_an_evaluation_is_left_out_when_the_run_is_to_stop(make, tmp_path, draw):
    answers = iter([False, True])
    found = make().run(10, Net(46), None, lambda: next(answers))
    assert found.distance is None and found.line == "step 10: the evaluation is left out, the run is to stop"
    assert len(draw.asked) == 1 and not (tmp_path / "run/best").exists()


def test_a_resumed_run_knows_the_best_so_far(make, tmp_path):
    make().run(5, Net(45), None)
    again = make()
    assert ", best " in again.run(10, Net(30), None).line
    assert best(tmp_path)["step"] == 5
    again.run(15, Net(50), None)
    assert best(tmp_path)["step"] == 15


def test_a_best_of_other_settings_is_not_compared_with(make):
    make().run(5, Net(), None)
    with pytest.raises(InputError, match="best was chosen with samples 70, not 71; give the flags as before"):
        make(71)


def test_a_best_of_another_reference_is_not_compared_with(make, reference):
    make().run(5, Net(), None)
    make(path=reference.parent / ".." / reference.parent.name / reference.name)
    np.savez(reference, arr_0=np.stack([noise(i, 50) for i in range(301)]))
    with pytest.raises(InputError, match="best was chosen with reference '.*', not '.*'; give the flags as before"):
        make()


def test_a_best_of_other_captions_is_not_compared_with(make):
    make(captions="a").run(5, Net(), None)
    with pytest.raises(InputError, match="best was chosen with captions 'a', not 'b'; give the flags as before"):
        make(captions="b")


def test_with_saved_statistics_no_features_of_the_reference_are_made(make, reference, monkeypatch):
    with np.load(reference) as file:
        images = file["arr_0"]
    expected = make().run(5, Net(), None).distance
    real = moments(Pixels()(images)["features"])
    np.savez(reference, arr_0=images, mu=real.mean, sigma=real.covariance)
    monkeypatch.setattr(Side, "extract", pytest.fail)
    shutil.rmtree(reference.parent / "run")
    assert make().run(5, Net(), None).distance == pytest.approx(expected, rel=1e-9)


def test_another_folder_of_that_name_is_refused_before_training(make, tmp_path):
    (tmp_path / "run/best").mkdir(parents=True)
    with pytest.raises(InputError, match=r"best holds no evaluation\.json"):
        make()


def test_samples_that_are_not_finite_are_said_and_leave_the_best(make, tmp_path):
    evaluation = make()
    evaluation.run(5, Net(45), None)
    found = evaluation.run(10, Net(float("nan")), None)
    assert found.distance is None
    assert "Frechet distance (pixels) not computed, 32 of 70 samples are not finite; " in found.line
    assert best(tmp_path)["step"] == 5
    evaluation.run(15, Net(50), None)
    assert best(tmp_path)["step"] == 15


def test_any_other_failure_ends_the_run(make, draw, monkeypatch):
    def fail(*_):
        raise InputError("no such caption")

    monkeypatch.setattr(Draw, "__call__", fail)
    with pytest.raises(InputError, match="no such caption"):
        make().run(5, Net(), None)


@pytest.mark.parametrize(("last", "expected"), [(15, [5, 10, 15]), (12, [5, 10, 12]), (3, [3])])
def test_an_evaluation_is_due_at_multiples_and_at_the_last_step(make, last, expected):
    evaluation = make()
    assert [step for step in range(1, last + 1) if evaluation.due(step, last)] == expected


def test_few_samples_are_noted(make):
    (note,) = make().notes
    assert note.startswith("each evaluation has 70 images, not more than its features have dimensions (192)")


def test_without_steps_there_is_no_evaluation(tmp_path):
    assert open_evaluation(EvaluationFlags(None, 70, None, "pixels", None), pytest.fail, tmp_path) is None


def test_a_reference_that_nothing_can_be_compared_with_is_refused_before_training(tmp_path, draw):
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "damaged.npz", mu=np.zeros(192), sigma=np.diag(np.full(192, -1.0)))
    maker = SampleMaker(draw, {}, (16, center_crop))
    for name, reason in (("one", "there are 1 of the images"), ("damaged", "negative eigenvalues")):
        flags = EvaluationFlags(5, 70, tmp_path / f"{name}.npz", "pixels", None)
        with pytest.raises(InputError, match=rf"--eval_reference .*{name}\.npz is of no use: .*{reason}"):
            open_evaluation(flags, lambda: maker, tmp_path)


def test_images_of_the_reference_are_brought_to_the_size_of_the_samples(tmp_path, draw):
    images = np.stack([noise(i, 50) for i in range(99)])
    np.savez(tmp_path / "same.npz", arr_0=images)
    np.savez(tmp_path / "wider.npz", arr_0=np.pad(images, ((0, 0), (0, 0), (4, 4), (0, 0))))
    maker = SampleMaker(draw, {}, (16, center_crop))
    distances = []
    for name in ("same", "wider"):
        flags = EvaluationFlags(5, 70, tmp_path / f"{name}.npz", "pixels", None)
        evaluation = open_evaluation(flags, lambda: maker, tmp_path)
        evaluation.keep_best_in(tmp_path / name, after=100)
        distances.append(evaluation.run(5, Net(), None).distance)
    assert distances[0] == pytest.approx(distances[1], rel=1e-9)
