"""What a demo does around its figures: prints and runs its steps, and writes down what came out."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from latent_diffusion.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def begin(*folders: Path) -> None:
    """Goes to the repository's root and empties the folders: features of one encoder must not meet another."""
    os.chdir(ROOT)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


class Steps:
    """Numbered steps, each under its title."""

    def __init__(self, count: int):
        self._count, self._begun = count, 0

    def begin(self, title: str) -> None:
        """Prints the title of the next step."""
        self._begun += 1
        print(f"\n[{self._begun}/{self._count}] {title}", flush=True)

    def run(self, title: str, line: str) -> None:
        """Runs what follows `python` on a command line, as the next step; raises InputError if it fails."""
        self.begin(title)
        words = shlex.split(line)
        print("$ python " + shlex.join(words), flush=True)
        status = subprocess.run([sys.executable, *words]).returncode
        if status:
            raise InputError(f"the demo stops: {words[0]} ended with exit status {status}")


def print_table(figures: dict[str, str]) -> None:
    """Prints one figure a line."""
    width = max(map(len, figures))
    print()
    for name, value in figures.items():
        print(f"  {name:<{width}}  {value:>8}")
    print()


def check_least(promises: Iterable[tuple[float, float, str]]) -> None:
    """Raises InputError for the first (figure, least, what falls short) that does; figures are shares in 0..1."""
    for figure, least, shortfall in promises:
        if figure < least:
            raise InputError(f"only {figure:.1%} {shortfall}; at least {least:.0%} was promised")
