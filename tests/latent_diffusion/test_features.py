import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.features import (
    FeatureStore,
    StreamBatchSampler,
    TrainingLoader,
    TrainingStream,
    list_arrays,
    read_array,
)
from latent_diffusion.objectives import LearnedRangeDDPM
from latent_diffusion.schedules import NoiseSchedule


def save(path, array, **settings):
    np.save(path, array, **settings)
    return path


@pytest.mark.parametrize("shape", [(4, 2, 2), (1, 4, 2, 2), (1, 1, 4, 2, 2)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_array_is_read_without_its_leading_ones(tmp_path, shape, dtype):
    values = np.arange(16).reshape(shape).astype(dtype)
    array = read_array(save(tmp_path / "a.npy", values), (4, 2, 2))
    assert array.dtype == dtype and array.shape == (4, 2, 2)
    np.testing.assert_array_equal(array, values.reshape(4, 2, 2))


def test_a_missing_array_is_named(tmp_path):
    with pytest.raises(InputError, match=r"a\.npy is missing"):
        read_array(tmp_path / "a.npy")


@pytest.mark.parametrize("length", [0, 5, 60, 140])
def test_a_truncated_array_is_named(tmp_path, length):
    path = save(tmp_path / "a.npy", np.zeros((4, 2, 2), np.float32))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"cannot read the feature file .*a\.npy .*extract it again") as error:
        read_array(path, (4, 2, 2))
    assert "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the file was executed",)


def test_a_pickled_array_is_refused_and_not_executed(tmp_path):
    with pytest.raises(InputError, match=r"a\.npy"):
        read_array(save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, bad):
    values = np.zeros((4, 2, 2), np.float16)
    values[2, 1, 0] = bad
    with pytest.raises(InputError, match=r"a\.npy holds values that are not finite"):
        read_array(save(tmp_path / "a.npy", values), (4, 2, 2))


@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 2), (2, 4, 2, 2)])
def test_another_shape_is_refused(tmp_path, shape):
    with pytest.raises(InputError, match=r"a\.npy has shape .*expected \(4, 2, 2\)"):
        read_array(save(tmp_path / "a.npy", np.zeros(shape, np.float32)), (4, 2, 2))


@pytest.mark.parametrize("values", [np.array(["text"]), np.array([1j]), np.array([True])])
def test_what_is_no_array_of_numbers_is_refused(tmp_path, values):
    with pytest.raises(InputError, match=r"a\.npy does not hold one array of numbers"):
        read_array(save(tmp_path / "a.npy", values))


def test_an_archive_of_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", values=np.zeros(3))
    with pytest.raises(InputError, match=r"a\.npz does not hold one array of numbers"):
        read_array(tmp_path / "a.npz")


def test_arrays_are_listed_sorted_and_alone(tmp_path):
    for name in ("b.npy", "10.npy", "a.npy", "notes.txt"):
        (tmp_path / name).touch()
    assert list_arrays(tmp_path) == ["10.npy", "a.npy", "b.npy"]


def test_arrays_named_by_numbers_are_listed_by_number(tmp_path):
    for name in ("10", "9", "002", "0"):
        save(tmp_path / f"{name}.npy", np.zeros(1))
    assert list_arrays(tmp_path) == ["0.npy", "002.npy", "9.npy", "10.npy"]


def test_a_folder_without_arrays_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no .npy file"):
        list_arrays(tmp_path)
    with pytest.raises(InputError, match="cannot list the feature folder .*nowhere"):
        list_arrays(tmp_path / "nowhere")


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_together_cover_what_one_process_covers(world_size):
    """Batch by batch: the step of 12 samples holds the same positions however many processes share it."""
    alone = list(StreamBatchSampler(12, first=2, last=5))
    shared = [list(StreamBatchSampler(12 // world_size, 2, 5, rank, world_size)) for rank in range(world_size)]
    together = [sum((batches[k] for batches in shared), []) for k in range(3)]
    assert together == alone == [list(range(24, 36)), list(range(36, 48)), list(range(48, 60))]


def test_the_sampler_starts_and_ends_where_told():
    sampler = StreamBatchSampler(4, first=3, last=5, rank=1, world_size=2)
    assert list(sampler) == [[28, 29, 30, 31], [36, 37, 38, 39]]
    assert len(sampler) == 2
    assert len(StreamBatchSampler(4, first=5, last=3)) == 0


class Numbers(FeatureStore):
    """Latents that hold their index; the condition is a random number."""

    latent_shape = (1, 2, 2)

    def __init__(self, length: int = 10, bad: int | None = None):
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def sample(self, index, rng):
        if index == self.bad:
            raise InputError(f"number {index} is bad")
        return {"latents": np.full((1, 2, 2), index, np.float32), "draw": rng.random(3)}


def stream(seed: int = 0, **settings) -> TrainingStream:
    return TrainingStream(Numbers(**settings), LearnedRangeDDPM(NoiseSchedule.linear()), seed)


def indices(stream: TrainingStream, epoch: int) -> list[int]:
    return [int(stream[epoch * len(stream) + k]["latents"][0, 0, 0]) for k in range(len(stream))]


def test_the_same_position_gives_the_same_sample():
    first, again = stream()[17], stream()[17]
    assert first.keys() == again.keys() == {"latents", "draw", "t", "noise"}
    for name in first:
        np.testing.assert_array_equal(first[name], again[name], err_msg=name)


def test_an_image_is_drawn_anew_in_every_epoch_and_for_every_seed():
    def find(seed, epoch):
        numbers = stream(seed)
        return numbers[10 * epoch + indices(numbers, epoch).index(4)]

    samples = [find(0, 0), find(0, 1), find(1, 0)]
    for name in ("draw", "noise"):
        assert len({sample[name].tobytes() for sample in samples}) == 3


def test_every_epoch_holds_every_index_once_in_another_order():
    numbers = stream(length=50)
    epochs = [indices(numbers, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    assert all(order != sorted(order) for order in epochs)
    assert indices(stream(seed=1, length=50), 0) != epochs[0]


def batches(workers: int) -> list[dict[str, np.ndarray]]:
    loader = TrainingLoader(stream(), StreamBatchSampler(4, first=1, last=6), workers)
    return [{name: value.numpy() for name, value in batch.items()} for batch in loader]


def test_loader_workers_change_nothing():
    """Five batches of 4 over epochs of 10: some reach into the next epoch."""
    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == 5
    for one, two in zip(alone, shared, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    expected = [stream()[position] for position in range(4, 8)]
    np.testing.assert_array_equal(alone[0]["noise"], [sample["noise"] for sample in expected])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_sample_reaches_the_caller(workers, monkeypatch):
    """As the error it is, without a traceback of the loader's thread."""
    in_threads = []
    monkeypatch.setattr(threading, "excepthook", in_threads.append)
    numbers = stream(bad=7)
    met = indices_until_bad(numbers)
    loader = TrainingLoader(numbers, StreamBatchSampler(2, first=0, last=5), workers)
    with pytest.raises(InputError) as error:
        for number, batch in enumerate(loader):
            assert isinstance(batch["latents"], paddle.Tensor)
            assert number < met // 2
    assert str(error.value) == "number 7 is bad"
    assert not in_threads


def indices_until_bad(numbers: TrainingStream) -> int:
    return indices(stream(), 0).index(numbers.store.bad)


def test_damaged_headers_are_named(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 8, 8), np.float32))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(whole)
        for position in rng.integers(128, size=rng.integers(1, 6)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert read_array(path, (4, 8, 8)).shape == (4, 8, 8)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_a_header_that_claims_a_huge_array_is_named(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 8, 8), np.float32))
    path.write_bytes(path.read_bytes().replace(b"(4, 8, 8), }            ", b"(99999999999, 9999), }  "))
    with pytest.raises(InputError, match=r"cannot read the feature file .*a\.npy"):
        read_array(path)


# A run that never takes its second batch, so that its workers wait.
RUN_WITH_WORKERS = """
import multiprocessing, time
from latent_diffusion.objectives import LearnedRangeDDPM
from latent_diffusion.schedules import NoiseSchedule
from latent_diffusion.features import StreamBatchSampler, TrainingLoader, TrainingStream
from tests.latent_diffusion.test_features import Numbers

stream = TrainingStream(Numbers(), LearnedRangeDDPM(NoiseSchedule.linear()), 0)
batches = iter(TrainingLoader(stream, StreamBatchSampler(2, 0, 100), num_workers=2))
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_workers_end_with_a_killed_run():
    root = Path(__file__).parents[2]
    run = subprocess.Popen([sys.executable, "-c", RUN_WITH_WORKERS], cwd=root, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while any(_lives(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_lives(pid) for pid in workers)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
