import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from latent_diffusion.errors import InputError, NotFiniteError
from latent_diffusion.evaluation.sampled_images import SampledImages
from latent_diffusion.evaluation.sweep import COLUMNS, Row, Setting, Table, grid
from latent_diffusion.evaluation.sweep_plot import plot

SETTINGS = grid(["ddim", "ddpm"], [25, 50], [1.0, 1.5, 4.0], [(0.0, 1.0), (0.1, 0.8)])


def row(setting: Setting, score: float = 9.5) -> Row:
    return Row(setting, 3.0 / setting.steps + setting.cfg_scale, score, 0.7, 1 / 3, 0.25)


@pytest.fixture
def table(tmp_path) -> Table:
    table = Table(tmp_path / "sweep.csv")
    for setting in SETTINGS[:3]:
        table.append(row(setting))
    return table


def test_a_grid_has_every_combination_and_no_guidance_once():
    assert len(SETTINGS) == 2 * 2 * (1 + 2 * 2) == len(set(SETTINGS))
    unguided = [setting for setting in SETTINGS if setting.cfg_scale == 1]
    assert len(unguided) == 4 and {setting.interval for setting in unguided} == {(0.0, 1.0)}
    assert grid(["ddim"], [5, 5], [2.0], [(0.1, 0.8)]) == [Setting("ddim", 5, 2.0, 0.1, 0.8)]


def test_settings_have_names():
    assert str(Setting("ddim", 25, 1.5, 0.0, 1.0)) == "ddim, 25 steps, scale 1.5"
    assert str(Setting("ddpm", 250, 4.0, 0.1, 0.8)) == "ddpm, 250 steps, scale 4, guided from 0.1 to 0.8"


def test_a_table_is_read_as_it_was_written(table):
    table.append(row(SETTINGS[3], score=math.nan))
    table.append(Row.empty(SETTINGS[4]))
    again = Table(table.path)
    assert again.rows[4].setting == SETTINGS[4] and math.isnan(again.rows[4].fid)
    assert again.rows[:3] == table.rows[:3] == [row(setting) for setting in SETTINGS[:3]]
    assert math.isnan(again.rows[3].inception_score) and again.rows[3].setting == SETTINGS[3]
    assert [setting in again for setting in SETTINGS[:6]] == [True] * 5 + [False]


def test_a_row_is_there_whole_or_not_at_all(table, monkeypatch):
    before = table.path.read_text()
    assert before.splitlines()[0] == ",".join(COLUMNS) and len(before.splitlines()) == 4

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(type(table.path), "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        table.append(row(SETTINGS[3]))
    assert table.path.read_text() == before and list(table.path.parent.iterdir()) == [table.path]
    assert SETTINGS[3] not in table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"sweep.csv has the columns a, b, not sampler, steps, .*; move it away or"),
        ("", "cannot read the table .*sweep.csv"),
        (",".join(COLUMNS) + "\nddim,25\n", "line 2 of .*sweep.csv is damaged; remove the line"),
        (",".join(COLUMNS) + "\nddim,25,1.5,0,1,much,,,,\n", "line 2 of .*sweep.csv is damaged"),
        (",".join(COLUMNS) + "\nddim,25,,0,1,3,,,,\n", "line 2 of .*sweep.csv is damaged"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, message):
    (tmp_path / "sweep.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        Table(tmp_path / "sweep.csv")


@pytest.fixture
def curves(monkeypatch):
    """`curves(rows)` -> what the panels of the picture show: label of the x axis, title, {(x, y) of a curve}, texts."""
    from matplotlib import pyplot

    def draw(rows, path):
        figures = []
        monkeypatch.setattr(pyplot, "close", figures.append)
        plot(rows, "FID", path)
        panels = []
        for axes in figures[0].axes:
            lines = {tuple(zip(*line.get_data(), strict=True)) for line in axes.lines}
            panels.append((axes.get_xlabel(), axes.get_title(), lines, [text.get_text() for text in axes.texts]))
        title = figures[0].get_suptitle()
        monkeypatch.undo()
        pyplot.close(figures[0])
        return title, panels

    return draw


def test_the_picture_shows_guidance_and_steps(curves, tmp_path):
    rows = [dataclasses.replace(row(setting), inception_score=10 * setting.cfg_scale) for setting in SETTINGS]
    rows[1] = dataclasses.replace(rows[1], fid=0.5)
    title, ((x, _, guidance, texts), (_, _, steps, _)) = curves(rows, tmp_path / "sweep.png")
    assert title == "Lowest FID: 0.5 with ddim, 25 steps, scale 1.5"
    # Both intervals begin at the row without guidance; the curves of both samplers lie upon each other.
    assert x == "Inception Score" and {"1", "1.5", "4"} == set(texts)
    assert guidance == {
        ((10, 1.12), (15, 0.5), (40, 4.12)),
        ((10, 1.12), (15, 1.62), (40, 4.12)),
        ((10, 1.06), (15, 1.56), (40, 4.06)),
    }
    assert steps == {
        ((25, 1.12), (50, 1.06)),
        ((25, 0.5), (50, 1.56)),
        ((25, 1.62), (50, 1.56)),
        ((25, 4.12), (50, 4.06)),
    }
    with Image.open(tmp_path / "sweep.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_the_picture_passes_over_rows_without_figures(curves, tmp_path):
    rows = [Row.empty(SETTINGS[0]), *(row(setting) for setting in SETTINGS[1:3])]
    title, ((x, _, guidance, _), (_, _, steps, _)) = curves(rows, tmp_path / "sweep.png")
    assert title == "Lowest FID: 1.62 with ddim, 25 steps, scale 1.5" and x == "Inception Score"
    assert guidance == {((9.5, 1.62), (9.5, 4.12))} and steps == {((25, 1.62),), ((25, 4.12),)}
    assert curves(rows[:1], tmp_path / "empty.png")[0] == "no setting has figures"


def test_the_points_of_one_curve_are_labeled(curves, tmp_path):
    for rows in (SETTINGS, SETTINGS[::-1]):
        _, ((*_, texts), _) = curves([row(setting) for setting in rows], tmp_path / "sweep.png")
        assert texts == ["1", "1.5", "4"]


def test_without_a_score_the_picture_shows_the_scale(curves, tmp_path):
    _, ((x, title, guidance, texts), _) = curves([row(s, math.nan) for s in SETTINGS[:3]], tmp_path / "sweep.png")
    assert x == "guidance scale" and "no Inception Score" in title and not texts
    assert guidance == {((1.0, 1.12), (1.5, 1.62), (4.0, 4.12))}


def test_sampled_images_are_drawn_when_they_are_asked_for(tmp_path):
    drawn = []
    images = SampledImages(
        tmp_path / "ddim", 5, "setting", lambda batch: drawn.append(batch) or np.zeros((len(batch),))
    )
    reader = images.read_ahead([range(2), range(4, 5)])
    assert images.count == 5 and not drawn
    assert [(batch, len(found)) for batch, found in reader] == [(range(2), 2), (range(4, 5), 1)]
    assert drawn == [range(2), range(4, 5)] and len(images.times) == 2 and min(images.times) >= 0


def test_sampled_images_end_before_those_that_are_not_finite(tmp_path):
    def draw(batch):
        if 2 in batch:
            raise NotFiniteError("not finite")
        return np.zeros((len(batch),))

    images = SampledImages(tmp_path / "ddim", 6, "setting", draw)
    assert [batch for batch, _ in images.read_ahead([range(2), range(2, 4), range(4, 6)])] == [range(2)]
