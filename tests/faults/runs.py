"""Tiny runs that can be killed: commands of their own, or forked from a process that has imported the stack."""

import atexit
import functools
import multiprocessing
import multiprocessing.connection
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from tests.cli.commands import REPOSITORY, Command, Result, environment

from . import shim

# Seconds after which a run hangs.
TIMEOUT = 180.0

# Threads may run commands; `multiprocessing` asks all its processes how they are when it starts one.
_ONE_AT_A_TIME = threading.Lock()


class Running:
    """Processes of one run; what they print goes into one file.

    Args:
        pids: of processes that the run consists of, the first one first.
        wait: returns the exit status of process number k after at most so many seconds, None if it still runs.
        output: the file.
    """

    def __init__(self, pids: list[int], wait: Callable[[int, float], int | None], output: Path):
        self.pids, self._wait, self.output = pids, wait, output

    def is_running(self) -> bool:
        """Whether all processes run."""
        return all(self._wait(k, 0) is None for k in range(len(self.pids)))

    def signal(self, number: int, *which: int) -> None:
        """Sends a signal to these processes, numbered from 0; to all where none is named."""
        for k in which or range(len(self.pids)):
            if self._wait(k, 0) is None:
                send(self.pids[k], number)

    def result(self, timeout: float = TIMEOUT) -> Result:
        """As `codes`; the status is that of the first one that failed, all output is in `out`."""
        codes = self.codes(timeout)
        return Result(next((code for code in codes if code), 0), self.output.read_text(errors="replace"), "")

    def codes(self, timeout: float = TIMEOUT) -> list[int]:
        """Waits for all processes; returns the exit status of each, or minus the signal that killed it.

        Raises:
            AssertionError: one does not end; then all are killed.
        """
        deadline = time.monotonic() + timeout
        codes = [self._wait(k, max(0.0, deadline - time.monotonic())) for k in range(len(self.pids))]
        if None in codes:
            self.end()
            raise AssertionError(f"a run did not end within {timeout:g} s; it printed: {self.output.read_text()}")
        return codes

    def end(self) -> None:
        """Kills what runs and waits for it."""
        self.signal(signal.SIGKILL)
        for k in range(len(self.pids)):
            self._wait(k, TIMEOUT)


class Server:
    """The process that runs are forked from; all servers of a process are the same one.

    Where there is a C compiler it has the library of `shim`, which does nothing unless variables ask for it.
    """

    def __init__(self):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.faults.stack"])
        variables = {"PYTHONPATH": str(REPOSITORY), "HF_DATASETS_CACHE": str(_folder("datasets"))}
        if shim.is_available():
            variables["LD_PRELOAD"] = str(_library())
        with _environment(environment() | variables):
            multiprocessing.forkserver.ensure_running()

    def call(self, function: Callable[..., None], *args: object) -> int:
        """Calls a function of a module in a fork; returns its exit status, or minus the signal that killed it."""
        fork = self._context.Process(target=function, args=args, daemon=True)
        fork.start()
        fork.join(TIMEOUT)
        return fork.exitcode

    def run(self, command: Command) -> Result:
        """Runs a Python script of the repository in a fork, as `commands.run` runs it in a process of its own."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder, name) for name in ("out", "err"))
            for file in (out, err):
                file.touch()
            variables = environment() | command.variables
            fork = self._context.Process(target=_run, args=(command.arguments, command.folder, variables, out, err))
            with _ONE_AT_A_TIME:
                fork.start()
            ended = multiprocessing.connection.wait([fork.sentinel], TIMEOUT)
            with _ONE_AT_A_TIME:
                if not ended:
                    fork.kill()
                fork.join()
            assert ended, f"{command} did not end within {TIMEOUT:g} s; it printed: {err.read_text()}"
            return Result(fork.exitcode, out.read_text(), err.read_text())

    def start(self, command: Command, output: Path, processes: int = 1, file_limit: int | None = None) -> Running:
        """Runs a Python script of the repository in a fork, or in a fork a rank.

        Args:
            command: the script and its flags, without a launcher.
            output: where all print to.
            processes: of the run; they find each other as under Paddle's launcher.
            file_limit: bytes that a file may have.
        """
        output.write_bytes(b"")
        variables = environment() | command.variables
        ranks = _ranks(processes) if processes > 1 else [{}]
        forks = [
            self._context.Process(
                target=_run,
                args=(command.arguments, command.folder, variables | rank, output, output, file_limit),
                daemon=True,
            )
            for rank in ranks
        ]
        for fork in forks:
            fork.start()

        def wait(k: int, seconds: float) -> int | None:
            forks[k].join(seconds)
            return forks[k].exitcode

        return Running([fork.pid for fork in forks], wait, output)


def start(command: Command, output: Path) -> Running:
    """Runs a command in a process of its own, which leads a group."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [command.program, *command.arguments],
            cwd=command.folder,
            env=environment() | command.variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(k: int, seconds: float) -> int | None:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    return Running([process.pid], wait, output)


@functools.cache
def _library() -> Path:
    """The library of `shim`."""
    return shim.build(_folder("shim"))


@functools.cache
def _folder(name: str) -> Path:
    """A folder that this process removes at its end."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def children(pid: int) -> list[int]:
    """The processes that a process has started, in their order."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def exists(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def send(pid: int, number: int) -> None:
    """Sends a signal to a process, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _ranks(processes: int) -> list[dict[str, str]]:
    """What Paddle's launcher tells the processes of a run on one CPU."""
    endpoints = [f"127.0.0.1:{port}" for port in _free_ports(processes)]
    return [
        {
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_RANK_IN_NODE": str(rank),
            "PADDLE_TRAINERS_NUM": str(processes),
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
            "PADDLE_DISTRI_BACKEND": "gloo",
        }
        for rank in range(processes)
    ]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _run(
    arguments: list[str], folder: Path, variables: dict[str, str], out: Path, err: Path, file_limit: int | None = None
) -> None:
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    _become(arguments, folder, variables, out, err)
    runpy.run_path(arguments[0], run_name="__main__")


def run_script(arguments: list[str], folder: Path, variables: dict[str, str], output: Path) -> NoReturn:
    """In a process that was just forked: runs a script, as a command of its own would, and ends."""
    try:
        _become(arguments, folder, variables, output, output)
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code or 0)


def _become(arguments: list[str], folder: Path, variables: dict[str, str], out: Path, err: Path) -> None:
    for standard, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), standard)
    os.chdir(folder)
    os.environ.update(variables)  # those that the stack was imported with stay: its mathematics depends on them
    from paddle.distributed import parallel

    parallel._global_parallel_env = None  # it was made at the import, when nothing said that there are ranks
    # Python would keep it, as a daemon, from starting the processes that read data.
    multiprocessing.current_process()._config["daemon"] = False
    sys.argv = arguments


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    former = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(former)
