"""The picture of a sweep: what the guidance scale does to the Frechet distance, and what the number of steps does."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import replace_file
from ..guidance import ALL_STEPS
from .sweep import Row, Setting

_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot(rows: Sequence[Row], distance: str, path: Path) -> None:
    """Draws a PNG of two panels.

    The left one has the distance against the Inception Score, or against the guidance scale where the extractor gives
    no such score: a curve over the scales for each sampler, interval and number of steps. The right one has the
    distance against the number of steps: a curve for each sampler, interval and scale. Rows without a
    distance are left out.

    Args:
        rows: of the table.
        distance: what the Frechet distance is called.
        path: the file; it appears when it is complete.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if not math.isnan(row.fid)]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    by_scale = sorted(_on_all_curves(rows), key=lambda row: row.setting.cfg_scale)
    if any(math.isnan(row.inception_score) for row in rows):
        left.set(xlabel="guidance scale", title="Guidance (no Inception Score: the extractor has no logits)")
        _draw_curves(left, by_scale, lambda row: row.setting.cfg_scale, _way, _steps)
    else:
        left.set(xlabel="Inception Score", title="Guidance (the numbers are the scales)")
        _draw_curves(left, by_scale, lambda row: row.inception_score, _way, _steps)
        _label_points(left, by_scale)
    steps = sorted({row.setting.steps for row in rows})
    right.set(xlabel="sampling steps", title="Steps", xticks=steps)
    by_steps = sorted(rows, key=lambda row: (row.setting.steps, row.setting.cfg_scale))
    _draw_curves(right, by_steps, lambda row: row.setting.steps, _scale, _way)
    for axes in (left, right):
        axes.set_ylabel(distance)
        axes.grid(alpha=0.3)
    best = min(rows, key=lambda row: row.fid, default=None)
    figure.suptitle(f"Lowest {distance}: {best.fid:.4g} with {best.setting}" if best else "no setting has figures")
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    pyplot.close(figure)


def _on_all_curves(rows: Sequence[Row]) -> list[Row]:
    """The rows, those without guidance once for each interval: all its curves begin there."""
    intervals = dict.fromkeys(row.setting.interval for row in rows if row.setting.cfg_scale != 1) or [ALL_STEPS]
    guided = [row for row in rows if row.setting.cfg_scale != 1]
    unguided = [
        dataclasses.replace(row, setting=dataclasses.replace(row.setting, guidance_low=low, guidance_high=high))
        for row in rows
        if row.setting.cfg_scale == 1
        for low, high in intervals
    ]
    return unguided + guided


def _draw_curves(
    axes: Any,
    rows: Sequence[Row],
    x: Callable[[Row], float],
    color: Callable[[Setting], str],
    style: Callable[[Setting], str],
) -> None:
    """Draws the distance over `x`, one curve for each pair of `color` and `style` that occurs, and two legends."""
    from matplotlib.lines import Line2D

    colors = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(color(row.setting) for row in rows))}
    names = dict.fromkeys(style(row.setting) for row in rows)
    styles = {
        # Hollow markers show those of equal curves beneath them.
        name: {"linestyle": _STYLES[i % len(_STYLES)], "marker": _MARKERS[i % len(_MARKERS)], "fillstyle": "none"}
        for i, name in enumerate(names)
    }
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        curves.setdefault((color(row.setting), style(row.setting)), []).append(row)
    for (hue, line), members in curves.items():
        axes.plot(list(map(x, members)), [row.fid for row in members], color=colors[hue], markersize=5, **styles[line])
    handles = [Line2D([], [], color=value, linewidth=4, label=name) for name, value in colors.items()]
    handles += [Line2D([], [], color="black", markersize=5, label=name, **value) for name, value in styles.items()]
    # Below the panel, where it hides nothing.
    axes.legend(handles=handles, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)


def _label_points(axes: Any, rows: Sequence[Row]) -> None:
    """Writes the scales beside the points of the first curve; those of other curves lie near them."""
    for row in rows:
        if (_way(row.setting), row.setting.steps) != (_way(rows[0].setting), rows[0].setting.steps):
            continue
        axes.annotate(
            f"{row.setting.cfg_scale:g}",
            (row.inception_score, row.fid),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=9,
        )


def _way(setting: Setting) -> str:
    if setting.interval == ALL_STEPS:
        return setting.sampler
    return f"{setting.sampler}, guided from {setting.guidance_low:g} to {setting.guidance_high:g}"


def _steps(setting: Setting) -> str:
    return f"{setting.steps} steps"


def _scale(setting: Setting) -> str:
    return f"scale {setting.cfg_scale:g}"
