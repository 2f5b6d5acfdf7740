"""Numbered experiment folders of the plain training loop: `results/000-DiT-XL-2`.

results/000-DiT-XL-2/
    arguments.json  arguments-N.json (of a run resumed at step N)  log.txt  runs/ (VisualDL)  checkpoint-N/  best/
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from . import checkpoint
from .errors import InputError
from .evaluation.training import Evaluation
from .files import replace_file
from .progress import LossyStream, training_line, write_line

_NAME = re.compile(r"(\d{3,})-(.+)")


def new_experiment(results_dir: Path, name: str) -> Path:
    """Makes the next numbered folder.

    Raises:
        InputError: it cannot be made.
    """
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        number = max((number for number, _ in _numbered(results_dir)), default=-1) + 1
        folder = results_dir / f"{number:03d}-{name}"
        folder.mkdir()
    except OSError as error:
        raise InputError(f"cannot make an experiment folder in {results_dir}: {error.strerror}") from None
    return folder


def find_checkpoint(
    results_dir: Path,
    name: str,
    resume: Path | Literal[True],
    lock: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """The checkpoint to resume from.

    Args:
        results_dir: where the experiments are.
        name: of the model, as in the names of the folders.
        resume: a checkpoint folder or an experiment folder; True for the newest experiment of that model.
        lock: called with the experiment folder, before its checkpoints are looked at: a run that is about to end may
            save another one while its lock is waited for.

    Raises:
        InputError: there is none.
    """
    if resume is not True:
        if checkpoint.is_checkpoint(resume):
            lock(folder_of(resume))
            checkpoint.verify(resume)
            return resume
        if not checkpoint.checkpoints(resume):
            raise InputError(f"--resume {resume} is neither a complete checkpoint folder nor an experiment with one")
        lock(resume)
        return checkpoint.newest_checkpoint(resume, checkpoint.verify)
    experiments = sorted(_numbered(results_dir), reverse=True) if results_dir.is_dir() else []
    for _, folder in experiments:
        if _NAME.fullmatch(folder.name)[2] != name:
            continue
        if checkpoint.checkpoints(folder):
            lock(folder)
            return checkpoint.newest_checkpoint(folder, checkpoint.verify)
        print(f"note: passed over {folder}, which has no checkpoint", file=sys.stderr)
    raise InputError(f"--resume found no experiment of {name} with a checkpoint in {results_dir}")


def folder_of(resumed: Path) -> Path:
    """The experiment folder of a checkpoint."""
    is_plain = resumed.name not in ("", "..") and not resumed.is_symlink()
    return (resumed if is_plain else resumed.resolve()).parent


def _numbered(results_dir: Path) -> list[tuple[int, Path]]:
    matches = ((_NAME.fullmatch(path.name), path) for path in results_dir.iterdir())
    return [(int(match[1]), path) for match, path in matches if match]


class Log:
    """Lines to the terminal and `log.txt`, curves to VisualDL; for one process of a run.

    What a full or failing disk does not take is lost, and the run goes on.

    Args:
        folder: the experiment folder.
        arguments: the flags, which are kept beside the log.
        first: the step that the run goes on from; 0 for a new one.
    """

    def __init__(self, folder: Path, arguments: dict, first: int):
        # It takes a second to import.
        from visualdl import LogWriter

        from . import curves

        curves.outlive_failing_disk()
        path = folder / "log.txt"
        self._file = LossyStream(path.open("a", buffering=1), str(path))
        self._curves = LogWriter(str(folder / "runs"))
        name = f"arguments-{first}.json" if first else "arguments.json"
        text = json.dumps(arguments, indent=2, default=str) + "\n"
        replace_file(folder / name, lambda path: path.write_text(text))

    def close(self) -> None:
        """Writes what is still in memory."""
        self._curves.close()
        self._file.close()

    def line(self, text: str) -> None:
        write_line(text)
        self._file.write(text + "\n")

    def step(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Logs the values of one step."""
        self.line(training_line(step, steps, values))
        for name, value in values.items():
            self._curves.add_scalar(f"train/{name}", value, step)

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Logs what an evaluation after one step found."""
        self.line(found.line)
        if found.distance is not None:
            self._curves.add_scalar("eval/fid", found.distance, step)
