import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion import loader
from latent_diffusion.errors import InputError
from latent_diffusion.features import TrainingStream
from latent_diffusion.loader import StreamBatchSampler, TrainingLoader

from .test_features import Numbers, indices, stream

# Batches of 4 MiB, twenty times of what a socket holds: a worker waits in the middle of one.
LARGE = (4, 128, 128)


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """And nothing waits for long."""
    monkeypatch.setattr(loader, "ANSWER_LIMIT", 20.0)
    yield
    assert not multiprocessing.active_children()


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


def load(store: Numbers | None = None, workers: int = 2, batch_size: int = 4, last: int = 7) -> TrainingLoader:
    """Batches 1 to `last - 1`; in epochs of 10, some batches of 4 reach into the next one."""
    numbers = stream() if store is None else TrainingStream(store, stream().objective, 0)
    return TrainingLoader(numbers, StreamBatchSampler(batch_size, 1, last), workers)


def arrays(batch: dict[str, paddle.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in batch.items()}


def assert_same(found: list[dict[str, paddle.Tensor]], expected: list[dict[str, paddle.Tensor]]) -> None:
    assert len(found) == len(expected) > 0
    for one, two in zip(map(arrays, found), map(arrays, expected), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert one[name].dtype == two[name].dtype
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_workers_change_nothing(workers):
    alone = list(load(workers=0))
    shared = load(workers=workers)
    assert len(shared) == len(alone) == 6
    assert_same(list(shared), alone)
    expected = [stream()[position] for position in range(4, 8)]
    np.testing.assert_array_equal(alone[0]["noise"], [sample["noise"] for sample in expected])


def test_an_iteration_can_be_repeated():
    twice = load()
    assert_same(list(twice), list(twice))


def test_without_batches_nothing_is_given():
    assert list(load(last=1)) == []


class Large(Numbers):
    latent_shape = LARGE

    def sample(self, index, rng):
        return {"latents": np.full(LARGE, index, np.float32)}


def test_large_batches_wait_for_one_another():
    """Nobody waits in a circle: neither where all workers are ahead, nor where the training process is."""
    alone, shared = (list(load(Large(), workers, batch_size=8)) for workers in (0, 3))
    assert_same(shared, alone)
    found = []
    for batch in load(Large(), workers=3, batch_size=8):
        time.sleep(0.05)
        found.append(batch)
    assert_same(found, alone)


def test_the_training_process_starts_no_thread():
    list(load(workers=0))
    threads = set(Path("/proc/self/task").iterdir())
    for _ in load():
        assert set(Path("/proc/self/task").iterdir()) == threads


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_sample_reaches_the_caller(workers):
    """As the error it is, when its batch is due."""
    found = []
    with pytest.raises(InputError) as error:
        found.extend(TrainingLoader(stream(bad=7), StreamBatchSampler(2, first=0, last=5), workers))
    assert str(error.value) == "number 7 is bad"
    assert len(found) == indices(stream(), 0).index(7) // 2


def at_7(action) -> Numbers:
    """A store that does something when number 7 is read."""

    class Acting(Numbers):
        def sample(self, index, rng):
            if index == 7:
                action()
            return super().sample(index, rng)

    return Acting()


def test_an_error_in_the_code_of_a_sample_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)loader worker \d of 2 failed:\nTraceback .*ZeroDivisionError"):
        list(load(at_7(lambda: 1 / 0)))


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by signal 9"),
        (lambda: os._exit(3), "ended with exit code 3"),
    ],
)
def test_a_worker_that_dies_is_named_at_once(end, how):
    with pytest.raises(InputError, match=rf"loader worker \d of 2 {how}; .* lack of memory: use fewer workers"):
        list(load(at_7(end)))


def workers_of_next_batch(batches) -> list[int]:
    """Takes a batch and waits until every worker sends, or has sent, another one; their process numbers."""
    next(batches)
    time.sleep(0.3)
    return [child.pid for child in multiprocessing.active_children()]


def test_a_worker_that_dies_within_a_batch_is_named():
    batches = iter(load(Large(), workers=1, batch_size=8))
    (worker,) = workers_of_next_batch(batches)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(InputError, match="loader worker 1 of 1 was killed by signal 9"):
        next(batches)


def test_a_worker_that_hangs_is_named_and_ended(monkeypatch):
    monkeypatch.setattr(loader, "ANSWER_LIMIT", 0.3)
    with pytest.raises(InputError, match=r"loader worker \d of 2 has not answered for 0.3 s; check the disk"):
        list(load(at_7(lambda: time.sleep(60))))
    assert not multiprocessing.active_children()


def test_a_worker_that_hangs_within_a_batch_is_named_and_ended(monkeypatch):
    monkeypatch.setattr(loader, "ANSWER_LIMIT", 2.0)
    batches = iter(load(Large(), workers=1, batch_size=8))
    (worker,) = workers_of_next_batch(batches)
    os.kill(worker, signal.SIGSTOP)
    with pytest.raises(InputError, match="loader worker 1 of 1 has not answered"):
        next(batches)


def test_time_between_batches_does_not_count(monkeypatch):
    monkeypatch.setattr(loader, "ANSWER_LIMIT", 2.0)
    batches = iter(load(workers=1))
    next(batches)
    time.sleep(2.2)
    next(batches)


def test_a_worker_that_cannot_be_started_is_named(monkeypatch):
    fork, forked = os.fork, []

    def fork_once() -> int:
        if forked:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        forked.append(True)
        return fork()

    monkeypatch.setattr(os, "fork", fork_once)
    with pytest.raises(InputError, match=r"cannot start loader worker 2 of 2 \(Resource temporarily unavailable\)"):
        list(load())


def test_no_more_workers_start_than_there_are_batches(monkeypatch):
    fork, forked = os.fork, []
    monkeypatch.setattr(os, "fork", lambda: forked.append(True) or fork())
    list(load(workers=9, last=3))
    assert len(forked) == 2


def exhaust(batches):
    list(batches)


def close_early(batches):
    next(batches)
    batches.close()


def drop(batches):
    next(batches)


def fail(batches):
    next(batches)
    with pytest.raises(KeyError) as error:
        batches.throw(KeyError("of the training step"))
    return error


def die(batches):
    for pid in workers_of_next_batch(batches):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(InputError) as error:
        list(batches)
    return error


@pytest.mark.parametrize("end", [exhaust, close_early, drop, fail, die])
def test_an_iteration_leaves_nothing(end):
    """No process, not even a dead one, no open file and no signal kept back."""
    children = _children()  # of other tests: a fork server, say
    exhaust(load(Large(), batch_size=8))
    files = set(Path("/proc/self/fd").iterdir())
    batches = iter(load(Large(), batch_size=8))
    error = end(batches)  # it holds what its traceback names
    del batches
    assert _children() == children
    assert set(Path("/proc/self/fd").iterdir()) == files
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}
    del error


def _children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_workers_pass_over_signals_that_ask_a_run_to_stop():
    batches = iter(load(last=20))
    found = [next(batches)]
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    assert_same([*found, *batches], list(load(workers=0, last=20)))


def test_workers_free_nothing_of_the_training_process(tmp_path):
    """Garbage there may be tensors, and to free one may need a lock that is never released in a worker."""

    class Garbage:
        def __del__(self):
            (tmp_path / str(os.getpid())).touch()

    gc.disable()
    try:
        garbage = Garbage()
        garbage.itself = garbage
        del garbage
        list(load(at_7(gc.collect)))
    finally:
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_a_worker_whose_parent_ended_before_ends(monkeypatch):
    """The kernel tells only of what ends later."""
    prctl, not_the_parent = ctypes.CDLL(None).prctl, 1
    child = multiprocessing.get_context("fork").Process(target=loader._die_with_parent, args=(prctl, not_the_parent))
    child.start()
    child.join(10)
    assert child.exitcode == 1


class Stalling(Numbers):
    """Of which every process can read one batch of 4."""

    reads = 0

    def sample(self, index, rng):
        self.reads += 1
        if self.reads > 4:
            time.sleep(60)
        return super().sample(index, rng)


RUN_WITH_WORKERS = """
import multiprocessing, sys, time
from tests.latent_diffusion.test_loader import Stalling, load

batches = iter(load(Stalling()))
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""
ENDS = {"killed": "time.sleep(60)", "error": "1 / 0", "exit": "sys.exit(3)"}


@pytest.mark.parametrize("end", ENDS)
def test_workers_end_with_their_run(end):
    program = RUN_WITH_WORKERS + ENDS[end]
    root = Path(__file__).parents[2]
    run = subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        workers = [int(pid) for pid in run.stdout.readline().split()]
        assert len(workers) == 2
        if end != "killed":
            assert run.wait(10) == {"error": 1, "exit": 3}[end]
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
    deadline = time.monotonic() + 10
    while any(_lives(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_lives(pid) for pid in workers)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
