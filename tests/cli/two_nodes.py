"""Two hosts in one machine: Linux network namespaces joined by a veth pair, and runs of training on them.

By hand, as root: `python -m tests.cli.two_nodes` prints what the tests look at, and what a power cut does.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latent_diffusion.weights import read_paddle

from .commands import LAUNCH, TINY, TRAIN, Command, Result, environment, run, write_features

STEPS, SAVE_STEPS, LOGGING_STEPS = 100, 20, 10
KINDS = {"data parallel": (), "sharding stage1": ("--sharding", "stage1")}

INTERFACE, PORT = "eth0", 49178

# The hosts see nothing but each other, so no proxy is to be asked for the way. Gloo otherwise takes the address that
# the host name stands for, and namespaces share the name of the machine.
HOST_ENVIRONMENT = {"NO_PROXY": "*", "no_proxy": "*", "GLOO_SOCKET_IFNAME": INTERFACE}

TIMEOUT = 120.0


class NoNamespacesError(Exception):
    """This machine or this user cannot make network namespaces; the message says why."""


@dataclass(frozen=True)
class Host:
    """A network namespace and its address."""

    namespace: str
    address: str

    def start(self, command: Command, log: Path) -> "Running":
        """Starts a command here; what it prints goes to `log`."""
        with log.open("w") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, sys.executable, *command.arguments],
                cwd=command.folder,
                env=environment() | HOST_ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return Running(process, log)

    def kill(self) -> None:
        """Ends everything that runs here at once; the kernel closes its connections."""
        while pids := _ip("netns", "pids", self.namespace).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)

    def cut_power(self) -> None:
        """Ends everything that runs here, and no peer is told."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "down")
        self.kill()

    def restore_power(self) -> None:
        _ip("-n", self.namespace, "link", "set", INTERFACE, "up")


@dataclass(frozen=True)
class Running:
    """A command on a host."""

    process: subprocess.Popen
    log: Path

    def finish(self) -> Result:
        """Waits for its end."""
        code = self.process.wait(TIMEOUT)
        printed = self.log.read_text()
        return Result(code, printed, printed)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two hosts that see nothing but each other; they and all that runs on them are gone afterwards.

    Raises:
        NoNamespacesError: they cannot be made here.
    """
    if shutil.which("ip") is None:
        raise NoNamespacesError("network namespaces need the command ip of iproute2")
    prefix = f"two-nodes-{uuid.uuid4().hex[:8]}"
    hosts = [Host(f"{prefix}-{i}", f"10.0.0.{i + 1}") for i in range(2)]
    with contextlib.ExitStack() as cleanup:
        try:
            for host in hosts:
                _ip("netns", "add", host.namespace)
                cleanup.callback(_ip, "netns", "delete", host.namespace)
                cleanup.callback(host.kill)
            _join(*hosts)
        except subprocess.CalledProcessError as error:
            raise NoNamespacesError(f"network namespaces are not allowed here: {error.stderr.strip()}") from error
        yield hosts


def _join(first: Host, second: Host) -> None:
    ends = ("name", INTERFACE, "netns", first.namespace, "type", "veth")
    _ip("link", "add", *ends, "peer", "name", INTERFACE, "netns", second.namespace)
    for host in (first, second):
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-n", host.namespace, "link", "set", interface, "up")


def training(folder: Path, *flags: str) -> Command:
    """The training command for two processes of four samples each, into folder/out."""
    write_features(folder / "features", 40)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    own = ("--do_train", "--config_file", "tiny.json", "--feature_path", "features", "--output_dir", "out")
    own += ("--max_steps", STEPS, "--save_steps", SAVE_STEPS, "--image_logging_steps", 0)
    own += ("--logging_steps", LOGGING_STEPS, "--per_device_train_batch_size", 4)
    own += ("--learning_rate", "1e-3", "--ema_decay", "0.99")
    return Command([str(part) for part in (TRAIN, *own, *flags)], folder)


def on_one_node(command: Command) -> Result:
    """Runs a command as two processes of this machine."""
    return run(Command([*LAUNCH, *command.arguments], command.folder))


def on_two_nodes(hosts: list[Host], command: Command) -> list[Result]:
    """Runs a command as one process on each host."""
    with _started(hosts, command) as running:
        return [node.finish() for node in running]


def survivor(hosts: list[Host], command: Command, death: Callable[[Host], None]) -> tuple[Result, float]:
    """Runs a command on both hosts and lets `death` befall the first, the master, in the midst of training.

    Returns:
        How the command ended on the other host, and how many seconds later.
    """
    with _started(hosts, command) as (_, other):
        _wait_until_trained(command.folder, SAVE_STEPS + LOGGING_STEPS, other)
        death(hosts[0])
        since = time.monotonic()
        return other.finish(), time.monotonic() - since


def _wait_until_trained(folder: Path, step: int, node: Running) -> None:
    deadline = time.monotonic() + TIMEOUT
    log = folder / "log_0" / "workerlog.0"
    while not (log.exists() and f"step {step}/" in log.read_text()):
        assert node.process.poll() is None and time.monotonic() < deadline, node.log.read_text()
        time.sleep(0.02)


@contextlib.contextmanager
def _started(hosts: list[Host], command: Command) -> Iterator[list[Running]]:
    launch = ("-m", "paddle.distributed.launch", "--nnodes", "2", "--nproc_per_node", "1")
    launch += ("--master", f"{hosts[0].address}:{PORT}")
    running = []
    try:
        for i, host in enumerate(hosts):
            own = ("--host", host.address, "--log_dir", f"log_{i}")
            node = Command([*launch, *own, *command.arguments], command.folder)
            running.append(host.start(node, command.folder / f"node_{i}.log"))
        yield running
    finally:
        for host in hosts:
            host.kill()


def last_checkpoint(command: Command) -> dict[str, dict]:
    """Weights, averaged weights, learning rate and optimizer state at the end of a run, by file."""
    files = (command.folder / f"out/checkpoint-{STEPS}").glob("*.pd*")
    return {path.name: read_paddle(path) for path in files}


def main() -> None:
    with two_hosts() as hosts, tempfile.TemporaryDirectory() as root:
        for kind, flags in KINDS.items():
            one, two, killed, cut = (
                training(Path(root) / kind / name, *flags) for name in ("one", "two", "killed", "cut")
            )
            on_one_node(one).ok()
            for result in on_two_nodes(hosts, two):
                result.ok()
            np.testing.assert_equal(last_checkpoint(two), last_checkpoint(one))
            print(f"{kind}: two nodes give bitwise the weights of one node with two processes", flush=True)
            for command, death in ((killed, Host.kill), (cut, Host.cut_power)):
                result, seconds = survivor(hosts, command, death)
                hosts[0].restore_power()
                print(f"{kind}, {death.__name__} on the master: the other node ends with exit status ", end="")
                print(f"{result.code} after {seconds:.1f} s", flush=True)
                for restarted in on_two_nodes(hosts, command):
                    restarted.ok()
                np.testing.assert_equal(last_checkpoint(command), last_checkpoint(one))
                print(f"{kind}: the same command again resumes and ends with bitwise the same weights", flush=True)


if __name__ == "__main__":
    main()
