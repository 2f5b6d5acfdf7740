import math
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from latent_diffusion import step_guard
from latent_diffusion.errors import InputError
from latent_diffusion.loader import StreamBatchSampler
from latent_diffusion.step_guard import SpikeDetector, StepGuard, squared_gradient_norm


class Stream:
    """Position p is image 100 + p of epoch 0."""

    def locate(self, position: int) -> tuple[int, int]:
        return 0, 100 + position


class Run:
    """A guarded run of batches of two samples; `losses` are those of all micro-batches of a step."""

    def __init__(self, on_nonfinite: str = "stop", micro_batches: int = 1, **kwargs):
        self.model, self.said, self.stop = paddle.nn.Linear(3, 2), [], SimpleNamespace(reason=None)
        sampler = StreamBatchSampler(2, 0, 10_000)
        self.guard = StepGuard(
            self.model, Stream(), sampler, on_nonfinite, self.stop, self.said.append, lambda: "advice", **kwargs
        )
        self.micro_batches, self.number = micro_batches, 0

    def step(self, *losses: float, norm: float | None = 1.0) -> bool:
        self.number += 1
        for batch in np.split(np.array(losses, np.float32), self.micro_batches):
            self.guard.add(paddle.to_tensor(batch))
        return self.guard.allows(self.number, None if norm is None else paddle.to_tensor(norm**2))


def test_the_norm_is_that_of_all_gradients():
    model = paddle.nn.Sequential(paddle.nn.Linear(3, 4), paddle.nn.Linear(4, 2), paddle.nn.Linear(2, 2))
    model[1](model[0](paddle.ones([5, 3]))).square().sum().backward()
    expected = sum(float((p.grad.numpy() ** 2).sum()) for p in model.parameters() if p.grad is not None)
    assert float(squared_gradient_norm(model.parameters())) == pytest.approx(expected, rel=1e-6)
    assert float(squared_gradient_norm(paddle.nn.Linear(2, 2).parameters())) == 0.0
    model[1].bias.grad = paddle.full([2], float("nan"))
    assert math.isnan(float(squared_gradient_norm(model.parameters())))


def test_sound_steps_are_made_without_a_word():
    run = Run()
    assert all(run.step(0.3, 0.2) for _ in range(3))
    assert run.said == [] and not run.guard.skipped and not run.guard.should_stop


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_and_images(bad):
    run = Run(micro_batches=2)
    run.step(0.3, 0.2, 0.3, 0.2)
    with pytest.raises(
        InputError, match=r"^the loss is not finite at step 2 \(loss of image 104, 107\); training stops and saves"
    ):
        run.step(bad, 0.2, 0.3, bad)


def test_a_gradient_that_is_not_finite_names_the_parameter_and_all_images():
    run = Run()
    run.model(paddle.ones([1, 3])).sum().backward()
    run.model.bias.grad = paddle.full([2], float("inf"))
    with pytest.raises(
        InputError, match=r"^the gradient is not finite at step 1 \(image 100, 101; first in the gradient of bias\)"
    ):
        run.step(0.3, 0.2, norm=float("inf"))


def test_a_step_may_be_left_out_instead():
    run = Run("skip")
    assert run.step(0.3, 0.2)
    assert not run.step(0.3, float("nan")) and run.guard.skipped
    assert run.step(0.3, 0.2) and not run.guard.skipped
    assert run.said == ["step 2 is left out: the loss is not finite at step 2 (loss of image 103)"]


def test_a_run_that_only_skips_has_diverged(monkeypatch):
    monkeypatch.setattr(step_guard, "SKIPS_IN_A_ROW", 3)
    run = Run("skip")
    for _ in range(2):
        assert not any(run.step(float("nan"), 1.0) for _ in range(3))
        assert run.step(1.0, 1.0)
    assert not any(run.step(float("nan"), 1.0) for _ in range(3))
    with pytest.raises(InputError, match=r"at step 12 \(.*\), as in the 3 steps before it; training stops"):
        run.step(float("nan"), 1.0)


def test_weights_are_compared_now_and_then_where_processes_have_them(monkeypatch):
    compared = []
    monkeypatch.setattr(step_guard.distributed, "check_agreement", lambda model, when: compared.append(when))
    for steps, expected in ((3, ["at step 3", "at step 6"]), (None, [])):
        compared.clear()
        run = Run(agreement_steps=steps)
        for _ in range(7):
            run.step(0.3, 0.2)
        assert compared == expected


def test_the_norm_is_kept_for_the_log():
    run = Run()
    run.step(0.3, 0.2, norm=2.5)
    assert run.guard.norm == 2.5
    run.step(0.3, 0.2, norm=None)
    assert run.guard.norm is None


def test_many_images_are_counted():
    images = Run().guard._images("image", np.arange(20))
    assert images.startswith("image 100, 101,") and images.endswith("115 and 4 more")


def losses(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0.2, 0.02, count)


def test_a_spike_is_said_with_the_image_it_is_of():
    run = Run()
    for loss in losses(210):
        assert run.step(loss, loss)
    assert run.said == []
    assert run.step(0.2, 3.0)
    (line,) = run.said
    assert line.startswith("loss spike at step 211: 1.6, before it 0.1") and line.endswith("; image 521 has the loss 3")


def test_two_spikes_in_a_row_are_both_seen():
    spikes = SpikeDetector()
    assert [spikes.look(loss) for loss in losses(500)] == [None] * 500
    assert all(spikes.look(1.0) for _ in range(5))
    assert spikes.look(0.2) is None


def test_a_falling_loss_has_no_spikes():
    spikes = SpikeDetector()
    curve = 0.1 + np.exp(-np.arange(2000) / 200) + np.random.default_rng(0).normal(0, 0.02, 2000)
    assert not any(spikes.look(loss) for loss in curve)


def test_a_request_to_stop_is_seen_at_the_next_step():
    run = Run()
    run.step(0.3, 0.2)
    run.stop.reason = "SIGTERM"
    assert run.step(0.3, 0.2) and run.guard.should_stop


def test_weights_that_are_not_finite_are_not_worth_saving():
    run = Run()
    run.guard.check_weights(1)
    run.model.bias.set_value(paddle.to_tensor([0.0, float("inf")]))
    with pytest.raises(InputError, match="a weight is not finite at step 5; training stops and saves nothing, advice"):
        run.guard.check_weights(5)
