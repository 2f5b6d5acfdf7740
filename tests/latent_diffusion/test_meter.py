import paddle
import pytest

from latent_diffusion import meter
from latent_diffusion.meter import Meter


def test_means_and_rates_are_of_the_time_since_the_last_reading(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    measured = Meter(samples_per_step=8, batches_per_step=2)
    for losses in ([1.0, 3.0, 2.0, 6.0], [5.0, 7.0]):
        for loss in losses:
            measured.add({"loss": paddle.to_tensor(loss), "mse": paddle.to_tensor(loss / 2)})
        measured.end_step()
        now[0] += 4.0
        values = measured.read()
        mean, steps = sum(losses) / len(losses), len(losses) / 2
        assert values == {
            "loss": pytest.approx(mean),
            "mse": pytest.approx(mean / 2),
            "samples_per_second": pytest.approx(8 * steps / 4),
            "steps_per_second": pytest.approx(steps / 4),
        }


def test_the_clock_does_not_run_while_it_is_paused(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    measured = Meter(samples_per_step=8)
    measured.add({"loss": paddle.to_tensor(1.0)})
    now[0] += 4.0
    with pytest.raises(MemoryError), measured.paused():
        now[0] += 50.0
        raise MemoryError
    assert measured.read()["steps_per_second"] == 1 / 4


def test_steps_while_the_clock_is_paused_count_for_means_and_not_for_rates(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    measured = Meter(samples_per_step=8)

    def step(loss: float, seconds: float) -> None:
        measured.add({"loss": paddle.to_tensor(loss)})
        measured.end_step()
        now[0] += seconds

    step(1.0, 4.0)
    with measured.paused():
        step(2.0, 50.0)
        with measured.paused():
            now[0] += 50.0
        assert measured.read() == {"loss": 1.5, "samples_per_second": 2.0, "steps_per_second": 0.25}
        step(3.0, 50.0)
        assert measured.read() == {"loss": 3.0}
        step(4.0, 50.0)
    step(6.0, 2.0)
    assert measured.read() == {"loss": 5.0, "samples_per_second": 4.0, "steps_per_second": 0.5}


def test_what_was_added_before_the_start_is_forgotten():
    measured = Meter(samples_per_step=1)
    measured.add({"loss": paddle.to_tensor(9.0)})
    measured.start()
    measured.add({"loss": paddle.to_tensor(1.0)})
    measured.end_step()
    assert measured.read()["loss"] == 1.0


def test_steps_that_were_left_out_take_time_and_have_no_loss(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    measured = Meter(samples_per_step=8)
    for losses, expected in (([1.0, float("nan")], {"loss": 1.0}), ([float("nan")] * 2, {})):
        for loss in losses:
            measured.add({"loss": paddle.to_tensor(loss)})
            measured.end_step(made=loss == 1.0)
        now[0] += 4.0
        assert measured.read() == expected | {"samples_per_second": 4.0, "steps_per_second": 0.5}


def test_the_steady_rate_is_of_the_median_step_without_the_first_ones_and_without_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    measured = Meter(samples_per_step=8)
    assert measured.steady_rate() is None
    for step, seconds in enumerate([50.0] * meter.FIRST_STEPS + [2.0, 2.0, 40.0, 4.0, 2.0]):
        measured.add({"loss": paddle.to_tensor(1.0)})
        now[0] += seconds / 2
        if step % 3 == 0:
            measured.read()
        with measured.paused():
            now[0] += 50.0
        now[0] += seconds / 2
        measured.end_step()
        if step < meter.FIRST_STEPS:
            assert measured.steady_rate() is None
    assert measured.steady_rate() == 8 / 2.0
