import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from latent_diffusion import stopping
from latent_diffusion.stopping import StopRequest
from tests.cli.commands import REPOSITORY


@pytest.fixture(autouse=True)
def own_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_an_end(number, capfd):
    with StopRequest() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == signal.Signals(number).name
    os.kill(os.getpid(), number)  # of the same request: the process is ending
    assert f"{signal.Signals(number).name}: stopping after this step" in capfd.readouterr().err


def test_a_signal_does_not_interrupt_a_system_call():
    """Paddle's store would take that for a lost connection."""
    reading, writing = os.pipe()
    timers = [
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)),
        threading.Timer(0.3, os.write, (writing, b"x")),
    ]
    with StopRequest() as stop:
        for timer in timers:
            timer.start()
        assert ctypes.CDLL(None).read(reading, ctypes.create_string_buffer(1), 1) == 1
        assert stop.reason == "SIGTERM"
    for timer in timers:
        timer.join()
    os.close(reading)
    os.close(writing)


def test_without_a_request_signals_mean_afterwards_what_they_meant_before():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_signals_of_the_first_second_are_one_request(capfd):
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    assert capfd.readouterr().err.count("SIGTERM") == 1


def test_a_later_signal_ends_the_process_at_once():
    code = f"""
import os, signal, time
from latent_diffusion.stopping import StopRequest
with StopRequest():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep({stopping.ONE_REQUEST + 0.1})
    os.kill(os.getpid(), signal.SIGTERM)
    print("never")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM and "never" not in done.stdout
    assert "SIGTERM once more: stopped at once" in done.stderr


def test_the_time_is_over_when_it_is(monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    stop = StopRequest(hours=0.5)
    now += 1799
    assert stop.reason is None
    now += 1
    assert stop.reason == "--max_run_hours 0.5"


def test_a_process_is_asked_to_stop_when_its_launcher_dies(tmp_path):
    child = """
import time
from latent_diffusion.stopping import StopRequest, follow_launcher
follow_launcher()
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.reason:
        time.sleep(0.01)
    open("stopped", "w").write(stop.reason)
"""
    code = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
child.stdout.readline()
os._exit(0)
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PADDLE_TRAINER_ID": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    deadline = time.monotonic() + 10
    while not (tmp_path / "stopped").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "stopped").read_text() == "SIGTERM"
