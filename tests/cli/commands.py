"""Runs the real commands in processes of their own, two at a time, with a tiny model on small features."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
TRAIN = str(REPOSITORY / "train_image_generation_dit_trainer.py")
LOOP = str(REPOSITORY / "train.py")
EXTRACT = str(REPOSITORY / "extract_features.py")
CONVERT = str(REPOSITORY / "scripts" / "convert_dit_to_ppdiffusers.py")
LAUNCH = ("-m", "paddle.distributed.launch", "--nnodes=1", "--nproc_per_node=2", "--use_env")

TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 10,
}

# Nothing is downloaded: the hub's clients meet a port where nobody listens.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
NO_NETWORK |= dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1")


@dataclass
class Command:
    """What follows the program on a command line, and where it is run; `variables` join those of `environment`."""

    arguments: list[str]
    folder: Path
    program: str = sys.executable
    variables: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    def ok(self) -> "Result":
        assert self.code == 0, self.err
        return self

    def logged(self, name: str) -> list[str]:
        """The values of one name in the lines that training prints, as they are printed."""
        lines = [line.split(f": {name} " if name == "loss" else f", {name} ") for line in self.out.splitlines()]
        return [parts[1].split(",")[0] for parts in lines if len(parts) == 2 and parts[0].startswith("step ")]


def environment() -> dict[str, str]:
    """The variables a command is run with."""
    left_out = ("PYTHONPATH", "CUDA_VISIBLE_DEVICES")
    kept = {name: value for name, value in os.environ.items() if name not in left_out and "PADDLE" not in name}
    return kept | NO_NETWORK | {"OMP_NUM_THREADS": "1"}


def run(command: Command) -> Result:
    """Runs one command with one thread, and nothing of the project in PYTHONPATH."""
    done = subprocess.run(
        [command.program, *command.arguments],
        cwd=command.folder,
        env=environment() | command.variables,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_all(commands: dict[str, Command], run: Callable[[Command], Result] = run) -> dict[str, Result]:
    """Runs commands that do not depend on each other, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(run, commands.values()), strict=True))


# What `in_turn` runs; {between} is done before the second command.
IN_TURN = """
import contextlib, io, json, runpy, sys
from pathlib import Path
results = []
for number, sys.argv in enumerate(json.loads(sys.argv[1])):
    if number == 1:
{between}
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def in_turn(commands: Iterable[Sequence[object]], folder: Path, between: str) -> Command:
    """Scripts with their arguments, run one after another in one process, since imports take most of the time.

    Args:
        commands: what each of them is to find in `sys.argv`.
        folder: where they are run.
        between: Python code that is run before the second.
    """
    words = json.dumps([[str(word) for word in command] for command in commands])
    code = IN_TURN.format(between=textwrap.indent(textwrap.dedent(between).strip(), " " * 8))
    return Command(["-c", code, words], folder, variables={"PYTHONPATH": str(REPOSITORY)})


def ends(done: Result) -> list[Result]:
    """How each of the commands of `in_turn` ended."""
    return [Result(*end) for end in json.loads(done.ok().out)]


def write_features(root: Path, count: int) -> Path:
    """Features of `count` images of 64 pixels in 10 classes, in class order as fast-DiT's are."""
    rng = np.random.default_rng(0)
    for kind in ("features", "labels"):
        (root / f"imagenet64_{kind}").mkdir(parents=True)
    for i in range(count):
        np.save(root / f"imagenet64_features/{i}.npy", rng.standard_normal((1, 4, 8, 8), dtype=np.float32))
        np.save(root / f"imagenet64_labels/{i}.npy", np.array([10 * i // count]))
    return root


def write_reference(path: Path) -> Path:
    """An `.npz` with 200 images of noise of 64 pixels, more than the features `pixels` have dimensions."""
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), dtype=np.uint8))
    return path


def without_later(source: Path, target: Path, step: int) -> Path:
    """A copy of a run's folder as it was when it had just saved the checkpoint of `step`."""
    shutil.copytree(source, target)
    for path in (target / "out").glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
    best = target / "out" / "best"
    if best.exists() and json.loads((best / "evaluation.json").read_text())["step"] > step:
        shutil.rmtree(best)
    return target
