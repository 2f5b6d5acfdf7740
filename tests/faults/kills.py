"""Kills training at random moments, many of them inside saving, and resumes it: the end must be that of a quiet run."""

import dataclasses
import fnmatch
import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo.tiny_sdxl import write_pipeline
from latent_diffusion import checkpoint
from latent_diffusion.weights import read_paddle
from tests.cli.commands import LAUNCH, LOOP, REPOSITORY, TINY, TRAIN, Command, write_features
from tests.sdxl_lora.captioned import write_image_folder

from . import shim
from .runs import Running, Server, children, exists, send, start

UVIT = str(REPOSITORY / "train_txt2img_uvit_coco_trainer.py")
UVIT_FEATURES = REPOSITORY / "tests/data/uvit/coco_features_tiny"
TINY_UVIT = {key: value for key, value in TINY.items() if key != "num_classes"}
TINY_UVIT |= {"clip_dim": 32, "num_text_tokens": 7}
SDXL = str(REPOSITORY / "train_text_to_image_lora_sdxl.py")
CAPTIONS = ["a cat", "the rain", "a red cat"] * 4

STEPS, SAVE_STEPS, BATCH = 8, 2, 8

# Everything that a process does to files while it saves a checkpoint or deletes an old one.
SAVING = "*/.checkpoint-*"

# The same while images and captions are encoded.
CACHING = "*/out/cache/*"

# Kills of the full form: of runs that are forked, and of runs under Paddle's launcher.
KILLS, LAUNCHED_KILLS = 100, 12
KILLS_PER_CHAIN = 4

# Files that depend on the moment at which a run began, or are not arrays.
NOT_COMPARED = {"trainer_state.json", "training_args.bin", "manifest.json"}

# Milliseconds that each call inside saving takes longer where that is to go on for a while.
DELAY = 10

# Seconds for which the other processes of a run may go on after one was killed, as under a launcher.
GRACE = 0.3


@dataclass(frozen=True)
class Kind:
    """A training command, on so many processes."""

    name: str
    processes: int
    arguments: tuple[str, ...]
    results: str

    def command(self, folder: Path, *flags: object, variables: dict[str, str] | None = None) -> Command:
        """The command to begin or to go on, run in `folder`."""
        resume = ("--resume",) if self.name == "loop" and self.newest(folder) else ()
        words = [str(word) for word in (*self.arguments, *resume, *flags)]
        return Command(words, folder, variables=variables or {})

    def outputs(self, folder: Path) -> list[Path]:
        """The folders that hold checkpoints: the plain loop begins another one where there is nothing to resume."""
        return sorted(folder.glob(self.results))

    def newest(self, folder: Path) -> Path | None:
        """The newest complete checkpoint.

        Raises:
            InputError: no checkpoint is complete.
        """
        found = [checkpoint.newest_checkpoint(output, checkpoint.verify) for output in self.outputs(folder)]
        return next((path for path in reversed(found) if path), None)

    def is_saving(self, folder: Path) -> bool:
        """Whether a checkpoint is being written or deleted, or was when the run was killed."""
        return any(any(output.glob(".checkpoint-*")) for output in self.outputs(folder))


def make_kinds(folder: Path) -> dict[str, Kind]:
    """All kinds by name and number of processes ("loop 2"), with their data in `folder`."""
    features = write_features(folder / "features", 40)
    dit, uvit = folder / "tiny.json", folder / "tiny_uvit.json"
    dit.write_text(json.dumps(TINY))
    uvit.write_text(json.dumps(TINY_UVIT))
    write_pipeline(folder / "pipeline", CAPTIONS)
    captioned = write_image_folder(folder / "captioned", CAPTIONS)
    trainer = ("--do_train", "--output_dir", "out", "--max_steps", STEPS, "--save_steps", SAVE_STEPS)
    trainer += ("--save_total_limit", 2, "--logging_steps", 1, "--image_logging_steps", 0, "--learning_rate", "1e-3")
    trainer += ("--ema_decay", 0.5, "--dataloader_num_workers", 0)
    loop = ("--max-steps", STEPS, "--ckpt-every", SAVE_STEPS, "--global-batch-size", BATCH, "--lr", "1e-3")
    loop += ("--ema-decay", 0.5, "--log-every", 1, "--num-workers", 0, "--model", dit, "--feature-path", features)
    kinds = {}
    for processes in (1, 2):
        share = ("--per_device_train_batch_size", BATCH // processes)
        of_dit = (TRAIN, *trainer, *share, "--config_file", dit, "--feature_path", features)
        of_uvit = (UVIT, *trainer, *share, "--unet_config_file", uvit, "--feature_path", UVIT_FEATURES)
        of_uvit += ("--model_max_length", 7)
        of_sdxl = (SDXL, *trainer, *share, "--pretrained_model_name_or_path", folder / "pipeline", "--resolution", 32)
        of_sdxl += ("--train_data_dir", captioned, "--cache_latents", "--random_flip", "--use_ema")
        for name, arguments, results in (
            ("trainer", of_dit, "out"),
            ("loop", (LOOP, *loop), "results/*"),
            ("uvit", of_uvit, "out"),
            ("sdxl", of_sdxl, "out"),
        ):
            kinds[f"{name} {processes}"] = Kind(name, processes, tuple(map(str, arguments)), results)
    return kinds


@dataclass(frozen=True)
class Quiet:
    """How an undisturbed run ended.

    Attributes:
        final: its last checkpoint.
        seconds: that it took.
        calls: that its first process made on the files of `SAVING`, and of `CACHING`.
    """

    final: Path
    seconds: float
    calls: dict[str, int]


def run_quietly(server: Server, kind: Kind, folder: Path) -> Quiet:
    """Makes the run that others are compared with, in an empty folder."""
    folder.mkdir(parents=True)
    log = folder / "calls"
    fault = shim.Fault(f"{folder}/*", log=log, rank=0 if kind.processes > 1 else None)
    began = time.monotonic()
    command = kind.command(folder, variables=fault.variables())
    result = server.start(command, folder / "output", kind.processes).result()
    assert result.code == 0, result.out
    seconds = time.monotonic() - began
    paths = [call.path for call in shim.read_log(log)]
    calls = {pattern: len(fnmatch.filter(paths, pattern)) for pattern in (SAVING, CACHING)}
    return Quiet(final_checkpoint(kind, folder), seconds, calls)


def final_checkpoint(kind: Kind, folder: Path) -> Path:
    """The checkpoint of the last step; AssertionError where it is not there."""
    newest = kind.newest(folder)
    assert newest is not None and newest.name == f"checkpoint-{STEPS}", f"{folder}: the run ended at {newest}"
    return newest


def compare(one: Path, other: Path) -> None:
    """Raises AssertionError unless two checkpoints hold the same arrays, bit for bit, and are as they were written."""
    files = {path.name for path in one.iterdir()}
    assert files == {path.name for path in other.iterdir()}, f"{one} and {other} have other files"
    for name in sorted(files - NOT_COMPARED):
        if name.endswith((".json", ".safetensors")):
            assert (one / name).read_bytes() == (other / name).read_bytes(), f"{name} of {one} and {other} differ"
            continue
        first, second = (_flat(read_paddle(folder / name)) for folder in (one, other))
        assert first.keys() == second.keys(), f"{name} of {one} and {other} have other entries"
        for key, value in first.items():
            is_same = value.dtype == second[key].dtype and value.tobytes() == second[key].tobytes()
            assert is_same, f"{key} in {name} of {one} and {other} differs"
    for folder in (one, other):
        checkpoint.verify(folder)


def _flat(value: object, name: str = "") -> dict[str, np.ndarray]:
    if isinstance(value, dict):
        return {key: found for part, item in value.items() for key, found in _flat(item, f"{name}/{part}").items()}
    if isinstance(value, list | tuple):
        return _flat(dict(enumerate(value)), name)
    return {name: np.asarray(value)}


class Chain:
    """A run that is killed again and again, and then left alone.

    Args:
        server: has the shim.
        kind: of run.
        quiet: the same, undisturbed.
        folder: to be made.
        seed: of the moments.
    """

    def __init__(self, server: Server, kind: Kind, quiet: Quiet, folder: Path, seed: int):
        self.server, self.kind, self.quiet, self.folder = server, kind, quiet, folder
        self.rng, self.counts = random.Random(seed), Counter()
        folder.mkdir(parents=True)

    def run(self, kills: int, kill: Callable[["Chain"], None]) -> Counter:
        """Kills it so many times, resumes it each time, and compares the end with that of the quiet run."""
        while self.counts["kills"] < kills:
            before = step_of(self.kind.newest(self.folder))
            if before == STEPS:  # it ended before it was to be killed: another one
                self._finish()
                shutil.rmtree(self.folder)
                self.folder.mkdir()
                continue
            self.counts["resumes"] += self.counts["kills"] > 0
            kill(self)
            after = step_of(self.kind.newest(self.folder))
            assert after >= before, f"{self.folder}: at step {after} after a kill, at {before} before it"
        self._finish()
        return self.counts

    def _finish(self) -> None:
        self.counts["resumes"] += 1
        command = self.kind.command(self.folder)
        result = self.server.start(command, self.folder / "output", self.kind.processes).result()
        assert result.code == 0, f"{self.folder}: {result.out}"
        final = final_checkpoint(self.kind, self.folder)
        compare(self.quiet.final, final)
        left = [path.name for path in final.parent.glob(".checkpoint-*")]
        assert not left, f"{final.parent} still holds {left} of interrupted saves"
        self.counts["matches"] += 1

    def count_if(self, was_killed: bool) -> None:
        """Counts a kill, unless the run had ended."""
        self.counts["kills"] += was_killed
        self.counts["inside saving"] += was_killed and self.kind.is_saving(self.folder)


def step_of(path: Path | None) -> int:
    """The step of a checkpoint; 0 for None."""
    return 0 if path is None else checkpoint.read_progress(path).step


def kill_inside_saving(chain: Chain) -> None:
    """Kills the first process at a random call on files inside saving, or another one, which makes few, meanwhile."""
    kind = chain.kind
    rank = chain.rng.randrange(kind.processes)
    if rank > 0:
        step = step_of(kind.newest(chain.folder)) + SAVE_STEPS
        running = _start(chain, shim.Fault(SAVING, delay=DELAY, rank=0))
        wait_for(lambda: not running.is_running() or has_begun(kind, chain.folder, step))
        time.sleep(chain.rng.uniform(0, GRACE))
        running.signal(signal.SIGKILL, rank)
    else:
        running = _start_to_die(chain, SAVING)
    _end(chain, running)


def kill_inside_caching(chain: Chain) -> None:
    """Kills the first process at a random call on the files of the cache, while it is made."""
    _end(chain, _start_to_die(chain, CACHING))


def _start_to_die(chain: Chain, paths: str) -> Running:
    """Starts a run whose first process is killed at a random call on such files, and waits for its end."""
    kill_at = chain.rng.randint(1, max(2, chain.quiet.calls[paths] // 2))
    running = _start(chain, shim.Fault(paths, kill_at=kill_at, rank=0 if chain.kind.processes > 1 else None))
    wait_for(lambda: not running.is_running())
    return running


def kill_at_any_moment(chain: Chain) -> None:
    """Kills one process, or all, at a random moment."""
    running = _start(chain)
    time.sleep(chain.rng.uniform(0, chain.quiet.seconds))
    which = chain.rng.choice([*range(chain.kind.processes), None])
    running.signal(signal.SIGKILL, *([] if which is None else [which]))
    _end(chain, running)


def _start(chain: Chain, fault: shim.Fault | None = None) -> Running:
    command = chain.kind.command(chain.folder, variables=fault.variables() if fault else {})
    return chain.server.start(command, chain.folder / "output", chain.kind.processes)


def _end(chain: Chain, running: Running) -> None:
    """Kills what is left of a run, after a while, and looks at what was killed."""
    if chain.kind.processes > 1:
        time.sleep(chain.rng.uniform(0, GRACE))
    running.end()
    codes = running.codes()
    was_killed = -signal.SIGKILL in codes
    # A process may fail because another one was killed, but not by itself.
    assert was_killed or not any(codes), f"{chain.folder}: {running.output.read_text(errors='replace')}"
    chain.count_if(was_killed)


def kill_launched(chain: Chain) -> None:
    """Kills one process under Paddle's launcher, both, the launcher or all, as soon as some checkpoint is begun."""
    step = step_of(chain.kind.newest(chain.folder)) + chain.rng.choice((1, 2)) * SAVE_STEPS
    running = launch(chain.kind, chain.folder)
    wait_for(lambda: not running.is_running() or has_begun(chain.kind, chain.folder, step))
    workers = children(running.pids[0])
    whom = chain.rng.choice([workers[:1], workers[1:], workers, running.pids, [*running.pids, *workers]])
    chain.count_if(running.is_running() and len(workers) == chain.kind.processes)
    for pid in whom:
        send(pid, signal.SIGKILL)
    # The launcher stops the other processes; those of one that is gone stop by themselves.
    wait_for(lambda: not any(map(exists, workers)), f"{chain.folder}: of {workers} some stay, {whom} were killed")
    running.result()


def has_begun(kind: Kind, folder: Path, step: int) -> bool:
    """Whether the checkpoint of a step is there, at least in part."""
    names = [f".checkpoint-{step}.partial", f"checkpoint-{step}"]
    return any((output / name).exists() for output in kind.outputs(folder) for name in names)


def launch(kind: Kind, folder: Path, *flags: object) -> Running:
    """Starts a kind of run with a command of its own, under Paddle's launcher where it is of several processes."""
    command = kind.command(folder, *flags)
    launcher = LAUNCH if kind.processes > 1 else ()
    return start(dataclasses.replace(command, arguments=[*launcher, *command.arguments]), folder / "output")


def wait_for(condition: Callable[[], bool], complaint: str = "a run hangs", seconds: float = 90.0) -> None:
    """Returns as soon as the condition holds; AssertionError with the complaint where that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.002)


def make_chains(kinds: dict[str, Kind], kills: int, launched_kills: int) -> list[tuple[str, int, Callable]]:
    """Chains of about so many kills together, each with its kind, its kills and its way to kill.

    Three of four kills are inside saving. The runs under the launcher are few, since its start takes seconds.
    """
    ways = [kill_inside_saving, kill_inside_saving, kill_at_any_moment, kill_inside_saving]
    names = [
        "trainer 1",
        "loop 1",
        "trainer 2",
        "loop 2",
        "uvit 1",
        "trainer 1",
        "loop 2",
        "loop 1",
        "trainer 2",
        "uvit 2",
        "sdxl 1",
        "sdxl 2",
        "sdxl 1",
    ]
    forked = [
        (names[k % len(names)], KILLS_PER_CHAIN, ways[k % len(ways)]) for k in range(-(-kills // KILLS_PER_CHAIN))
    ]
    launched = [
        (("trainer 2", "loop 2")[k % 2], KILLS_PER_CHAIN, kill_launched)
        for k in range(-(-launched_kills // KILLS_PER_CHAIN))
    ]
    return [*launched, *forked, ("sdxl 1", KILLS_PER_CHAIN, kill_inside_caching), ("sdxl 2", 1, kill_inside_caching)]


def run(folder: Path, scale: float, seed: int = 0) -> dict[str, int | float | str]:
    """At least 100 kills and the stops of `stops`, see the package."""
    server, kinds = Server(), make_kinds(folder)
    chains = make_chains(kinds, round(KILLS * scale), round(LAUNCHED_KILLS * scale))
    used = sorted({name for name, _, _ in chains})
    quiet = {name: run_quietly(server, kinds[name], folder / "quiet" / name) for name in used}

    def one(number: int) -> Counter:
        name, kills, kill = chains[number]
        where = folder / f"chain-{number}"
        counts = Chain(server, kinds[name], quiet[name], where, 1000 * seed + number).run(kills, kill)
        print(f"chain {number}: {name}, {kill.__name__}: {dict(counts)}", flush=True)
        shutil.rmtree(where)
        return counts

    with ThreadPoolExecutor(2) as pool:
        totals = sum(pool.map(one, range(len(chains))), Counter())
    return {name: totals[name] for name in ("kills", "inside saving", "resumes", "matches")}
