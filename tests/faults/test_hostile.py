import json
import os
import pickle
import re
import sys
import time
from pathlib import Path

import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.files import file_sha256
from tests.cli.commands import LOOP, TINY, TRAIN, Command, write_features

from . import hostile
from .hostile import Attack, attempts, problems_of
from .runs import Server

RUN = b"cos\nsystem\n(S'touch code-was-run'\ntR."


def test_every_attack_fails(tmp_path):
    figures = hostile.run(tmp_path, 1.0)
    kinds = {name for name in figures if name not in ("attacks", "longest (s)", "most memory (MB)")}
    assert {"pickles", "safetensors", "JSON", "YAML", "tar shards", "images", "checkpoints", "model folders"} <= kinds
    assert figures["attacks"] == sum(figures[name] for name in kinds) >= 400


def refuse(path: Path) -> None:
    raise InputError(f"{path} is refused")


def problems(tmp_path: Path, read, content=RUN) -> str:
    """What is found wrong with a reader when it is given a pickle that runs a command."""
    attack = Attack("pickles", "system", read, "weights.bin", content)
    (outcome,) = attempts([attack], tmp_path / "attacks")
    return "; ".join(problems_of(attack, outcome))


def test_a_refusal_is_no_problem(tmp_path):
    assert problems(tmp_path, refuse) == ""


def also(action):
    """A reader that does something and then refuses the file."""

    def read(path: Path) -> None:
        action(path)
        refuse(path)

    return read


HELD = []
SUCCESSES = {
    "the file is unpickled": (
        also(lambda path: pickle.loads(path.read_bytes())),
        "os.system .*changed inside/code-was",
    ),
    "a name is looked up": (also(lambda path: pickle.loads(b"cos\ngetcwd\n.")), "pickle.find_class"),
    "a process is started": (also(lambda path: os.posix_spawn("/bin/true", ["true"], {})), "os.posix_spawn"),
    "a file is written": (also(lambda path: path.with_name("x").write_text("")), "opened .*changed inside"),
    "a file is removed": (also(lambda path: path.unlink()), "os.remove .*changed inside"),
    "a neighbor is read": (also(lambda path: (path.parents[1] / "secret.txt").read_text()), "opened .*secret.txt"),
    "a file of the system is read": (also(lambda path: Path("/etc/passwd").read_text()), "opened /etc/passwd"),
    "memory is taken": (also(lambda path: HELD.append(b"x" * 300_000_000)), "it took (29.|3..) MB"),
    "the file is read": (Path.read_bytes, "it was read, not refused"),
    "there is a traceback": (json.loads, "it was raised, not refused.*TypeError"),
    "the process dies": (lambda path: os._exit(3), "it was killed"),
    "another file is named": (lambda path: refuse(Path("other")), "does not name weights.bin"),
    "the refusal is long": (lambda path: refuse(Path("x" * 800, path.name)), "not one sentence"),
}


@pytest.mark.parametrize("name", SUCCESSES)
def test_an_attack_that_succeeds_is_noticed(tmp_path, name):
    read, words = SUCCESSES[name]
    found = problems(tmp_path, read)
    assert re.search(words, found, re.DOTALL), found


def test_memory_that_was_free_counts_when_it_is_taken(tmp_path):
    """As the memory that other tests freed, which the settings of `runtime` keep in the process."""
    freed = [b"x" * 10_000_000 for _ in range(40)]
    above = b"x" * 10_000_000
    del freed
    read, words = SUCCESSES["memory is taken"]
    assert re.search(words, problems(tmp_path, read)) and above


def test_an_attack_that_hangs_is_ended_and_the_next_one_is_executed(tmp_path, monkeypatch):
    monkeypatch.setattr(hostile, "TIME_LIMIT", 0.3)
    attacks = [
        Attack("pickles", name, read, "a", RUN) for name, read in (("hang", lambda _: time.sleep(60)), ("", refuse))
    ]
    assert [outcome.end for outcome in attempts(attacks, tmp_path / "attacks")] == ["killed", "refused"]


def resume(arguments: list[str], folder: Path, output: Path) -> None:
    """In a fork: runs a script, and ends with status 99 where it unpickles or lets Paddle do so."""
    import paddle

    from .runs import environment, run_script

    def note(event: str, details: tuple) -> None:
        if event == "pickle.find_class":
            os.write(2, f"unpickled {details}\n".encode())
            os._exit(99)

    def load(*details, **_) -> None:
        note("pickle.find_class", details)

    sys.addaudithook(note)
    paddle.load = load
    run_script(arguments, folder, environment(), output)


@pytest.fixture(scope="module")
def stack() -> Server:
    return Server()


@pytest.mark.parametrize("script", [TRAIN, LOOP])
def test_resuming_unpickles_nothing(tmp_path, stack, script):
    """The pickles of a checkpoint are read by this project's reader, or, as `training_args.bin`, by nothing."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    features = write_features(tmp_path / "features", 8)
    if script == TRAIN:
        own = ["--config_file", "config.json", "--feature_path", str(features), "--output_dir", "out", "--do_train"]
        own += ["--per_device_train_batch_size", "4", "--image_logging_steps", "0", "--max_steps"]
        run_folder, again = tmp_path / "out", []
    else:
        own = ["--model", "config.json", "--feature-path", str(features), "--results-dir", "out", "--image-size", "64"]
        own += ["--global-batch-size", "4", "--num-classes", "10", "--max-steps"]
        run_folder, again = tmp_path / "out" / "000-config", ["--resume"]
    first = stack.start(Command([script, *own, "2"], tmp_path), tmp_path / "first.txt").result()
    assert first.code == 0, first.out
    saved = run_folder / "checkpoint-2"
    output = tmp_path / "log.txt"
    output.touch()
    arguments = [script, *own, "4", *again]
    # No reader of a checkpoint needs it; what it says is not compared.
    (saved / "training_args.bin").write_bytes(RUN)
    _accept(saved)
    assert stack.call(resume, arguments, tmp_path, output) == 0, output.read_text()
    assert (run_folder / "checkpoint-4").is_dir() and not (tmp_path / "code-was-run").exists()
    (run_folder / "checkpoint-4" / "optimizer.pdopt").write_bytes(b"\x80\x02" + RUN)
    _accept(run_folder / "checkpoint-4")
    assert stack.call(resume, [script, *own, "6", *again], tmp_path, output) == 1
    last = output.read_text().splitlines()[-1]
    assert last.startswith("error:") and "optimizer.pdopt was refused: it asks for os.system" in last
    assert not (tmp_path / "code-was-run").exists()


def _accept(folder: Path) -> None:
    """Lets a manifest say that the files are as they are now: a checksum keeps no one from changing both."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        file = folder / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    path.write_text(json.dumps(manifest))
