import json

import pytest

from benchmarks.report import Table, format_cell, machine
from latent_diffusion.errors import InputError


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "-"), ("cpu", "cpu"), (0.35, "0.350"), (2.0, "2.00"), (123.4, "123"), (999.7, "1,000"), (12345, "12,345")],
)
def test_numbers_print_with_three_digits(cell, text):
    assert format_cell(cell) == text


def test_a_table_prints_as_it_is_made_and_keeps_exact_numbers(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = Table("times", "Times of a step", ["who  ", "s/step", "of peak"], {"of peak": ".0%"})
    table.row("ours", 1.23456, 0.4567)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "Times of a step",
        "",
        "| who   | s/step | of peak |",
        "| ----- | ------ | ------- |",
        "| ours  | 1.23   | 46%     |",
    ]
    table.write(note="quiet")
    written = json.loads((tmp_path / "output/bench/times.json").read_text())
    assert written["columns"] == ["who", "s/step", "of peak"]
    assert written["rows"] == [["ours", 1.23456, 0.4567]]
    assert written["name"] == "times" and written["title"] == "Times of a step" and written["note"] == "quiet"
    assert written["machine"]["cores"] >= 1


def test_a_row_must_fill_its_columns():
    with pytest.raises(ValueError):
        Table("times", "Times", ["a", "b"]).row("only one")


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").write_text("a file")
    with pytest.raises(InputError, match="output/bench"):
        Table("times", "Times", ["a"]).write()


def test_the_machine_is_described():
    described = machine()
    assert described["cpu"] and described["memory_gib"] > 0.5 and described["paddle"].startswith("3.")
    assert set(described) >= {"python", "omp_num_threads", "date", "commit"}
