import threading
import time

import pytest

from latent_diffusion import distributed
from latent_diffusion.errors import InputError


class Store:
    """Counts as the store of a launched run does."""

    def __init__(self):
        self.counts, self.lock = {}, threading.Lock()

    def add(self, key: str, amount: int) -> int:
        with self.lock:
            self.counts[key] = self.counts.get(key, 0) + amount
            return self.counts[key]


@pytest.fixture
def two_processes(monkeypatch):
    store = Store()
    monkeypatch.setattr(distributed.core, "create_or_get_global_tcp_store", lambda: store)
    monkeypatch.setattr(distributed.paddle.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.paddle.distributed, "get_rank", lambda: 0)
    return store


def test_one_process_waits_for_nobody():
    distributed.barrier(patience=0)
    assert distributed.from_first("text") == "text"


def test_a_process_that_never_comes_ends_the_wait(two_processes):
    with pytest.raises(InputError, match="1 of 2 processes did not come within 0.2 seconds"):
        distributed.barrier(patience=0.2)


def test_rank_0_leaves_last(two_processes):
    """It serves the store: were it gone, the others could not leave."""
    first = threading.Thread(target=distributed.barrier, kwargs={"patience": 30})
    first.start()
    while not two_processes.counts:
        time.sleep(0.01)
    (reached,) = two_processes.counts
    two_processes.add(reached, 1)
    first.join(0.5)
    assert first.is_alive()
    two_processes.add(reached.replace("reached", "left"), 1)
    first.join(10)
    assert not first.is_alive()
