"""Tables of measurements: Markdown on screen while they are made, then JSON with a description of the machine."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from latent_diffusion.files import write_file, write_json

ROOT = Path(__file__).resolve().parent.parent

# Where the JSON files are written, in the current folder.
FOLDER = Path("output") / "bench"

# None prints as "-".
Cell = str | int | float | None


class Table:
    """A Markdown table that prints each row at once and keeps its values; making it prints title and head.

    Args:
        name: of the JSON file.
        title: printed above the table.
        columns: names; trailing spaces widen a column and are left out of the JSON.
        formats: format specifications of numbers by column name, such as ".0%"; without one a float prints with three
            significant digits and an integer with commas.
    """

    def __init__(self, name: str, title: str, columns: Sequence[str], formats: Mapping[str, str] | None = None):
        self.name, self.title, self.columns = name, title, [column.rstrip() for column in columns]
        self.rows: list[list[Cell]] = []
        self._widths = [len(column) for column in columns]
        self._formats = [(formats or {}).get(column) for column in self.columns]
        print(f"\n{title}\n")
        self._print(columns)
        self._print(["-" * width for width in self._widths])

    def row(self, *cells: Cell) -> None:
        """Prints and keeps one row.

        Raises:
            ValueError: there are not as many cells as columns.
        """
        texts = [format_cell(cell, form) for cell, form in zip(cells, self._formats, strict=True)]
        self.rows.append(list(cells))
        self._print(texts)

    def failed(self, name: str, reason: str) -> None:
        """The row of what could not be measured."""
        self.row(name, f"failed: {reason}", *[None] * (len(self.columns) - 2))

    def content(self) -> dict:
        """Name, title, columns and the rows, whose numbers are not rounded."""
        return {"name": self.name, "title": self.title, "columns": self.columns, "rows": self.rows}

    def write(self, **more: object) -> None:
        """Writes `output/bench/<name>.json`: the table, the machine, and what else is given.

        Raises:
            InputError: the file cannot be written.
        """
        write(self.name, self.content() | more)

    def _print(self, texts: Sequence[str]) -> None:
        padded = [text.ljust(width) for text, width in zip(texts, self._widths, strict=True)]
        print("| " + " | ".join(padded) + " |", flush=True)


def write(name: str, values: Mapping[str, object]) -> None:
    """Writes values and the machine to `output/bench/<name>.json`, and prints where.

    Raises:
        InputError: the file cannot be written.
    """
    path = FOLDER / f"{name}.json"
    write_file(path, lambda temporary: write_json(temporary, {**values, "machine": machine()}))
    print(f"\nwrote {path}", flush=True)


def format_cell(cell: Cell, form: str | None = None) -> str:
    """A cell as a table shows it."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if form is None:
        form = "#.3g" if isinstance(cell, float) and abs(cell) < 999.5 else ",.0f"
    # "#" keeps trailing zeros; without it nothing would tell 1.00 from 1, but it also leaves a lone point.
    return format(cell, form).rstrip(".")


def machine() -> dict[str, str | int | float | None]:
    """What the figures depend on: processor, memory (GiB), versions, threads, time and commit."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "python": platform.python_version(),
        "paddle": _paddle_version(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _field(path: str, name: str) -> str | None:
    """The first value of `name` in a file of lines "name : value"."""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _paddle_version() -> str | None:
    for distribution in ("paddlepaddle-gpu", "paddlepaddle"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None
