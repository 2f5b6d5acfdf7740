"""A sweep over ways to sample: the grid of settings, and the table of what each of them gives.

<folder>/settings.json   what all rows have in common, see `latent_diffusion.settings`
<folder>/sweep.csv       one row a setting, in the order in which they were finished
"""

import csv
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from ..errors import InputError
from ..files import replace_file
from ..guidance import ALL_STEPS
from ..reading import MAX_TEXT, read_bytes


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Attributes:
        sampler: its name.
        steps: calls of the network.
        cfg_scale: guidance scale, 1 for none.
        guidance_low: where guidance acts, see `latent_diffusion.guidance`.
        guidance_high: as `guidance_low`.
    """

    sampler: str
    steps: int
    cfg_scale: float
    guidance_low: float
    guidance_high: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.guidance_low, self.guidance_high

    def __str__(self) -> str:
        interval = (
            "" if self.interval == ALL_STEPS else f", guided from {self.guidance_low:g} to {self.guidance_high:g}"
        )
        return f"{self.sampler}, {self.steps} steps, scale {self.cfg_scale:g}{interval}"


@dataclass(frozen=True)
class Row:
    """What a setting gives; NaN where a figure cannot be computed: all where samples are not finite.

    Attributes:
        setting: the setting.
        fid: Frechet distance of the extractor's features.
        inception_score: needs an extractor with logits.
        precision: share of samples that are among the real images.
        recall: share of real images that are among the samples.
        seconds_per_image: of sampling in one process, without features; the median over batches.
    """

    setting: Setting
    fid: float
    inception_score: float
    precision: float
    recall: float
    seconds_per_image: float

    @classmethod
    def empty(cls, setting: Setting) -> "Row":
        """The row of a setting without figures."""
        return cls(setting, *(math.nan for _ in FIGURES))


# Figures of a row that come from a comparison, under the names that `report.compare` has for them.
COMPARED = ["fid", "inception_score", "precision", "recall"]
FIGURES = [*COMPARED, "seconds_per_image"]
COLUMNS = [field.name for field in fields(Setting)] + FIGURES


def grid(
    samplers: Sequence[str], steps: Sequence[int], scales: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> list[Setting]:
    """All combinations, each once. Without guidance (scale 1) the interval makes no difference: it is all steps."""
    every = itertools.product(samplers, steps, intervals, scales)
    settings = [Setting(name, n, scale, *(interval if scale != 1 else ALL_STEPS)) for name, n, interval, scale in every]
    return list(dict.fromkeys(settings))


class Table:
    """The rows of a sweep, in a CSV file that is complete at any time.

    Args:
        path: the file; it need not be there.

    Raises:
        InputError: the file is no table of a sweep.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows = self._read() if path.exists() else []

    def __contains__(self, setting: Setting) -> bool:
        return any(row.setting == setting for row in self.rows)

    def append(self, row: Row) -> None:
        """Adds a row, also to the file."""
        rows = [*self.rows, row]
        replace_file(self.path, lambda path: _write(path, rows))
        self.rows = rows

    def _read(self) -> list[Row]:
        try:
            header, *lines = csv.reader(io.StringIO(read_bytes(self.path, MAX_TEXT).decode(), newline=""))
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"cannot read the table {self.path}: {error}; move it away") from None
        if header != COLUMNS:
            raise InputError(
                f"{self.path} has the columns {', '.join(header)}, not {', '.join(COLUMNS)}; move it away or take "
                "another --output-dir"
            )
        return [self._row(number, line) for number, line in enumerate(lines, start=2)]

    def _row(self, number: int, line: list[str]) -> Row:
        try:
            sampler, steps, scale, low, high, *figures = line
            setting = Setting(sampler, int(steps), float(scale), float(low), float(high))
            return Row(setting, *(float(value) if value else math.nan for value in figures))
        except (ValueError, TypeError):
            raise InputError(f"line {number} of {self.path} is damaged; remove the line and run again") from None


def _write(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            figures = (getattr(row, name) for name in FIGURES)
            writer.writerow([*astuple(row.setting), *("" if math.isnan(value) else value for value in figures)])
