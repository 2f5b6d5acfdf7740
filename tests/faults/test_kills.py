"""A few of the kills, stops and crash points of which `python -m tests.faults` makes many."""

import pytest

from . import crash_points, stops
from .kills import Chain, kill_at_any_moment, kill_inside_caching, kill_inside_saving


@pytest.mark.parametrize(
    ("name", "kill"),
    [("trainer 1", kill_inside_saving), ("loop 1", kill_inside_saving), ("uvit 1", kill_at_any_moment)],
)
def test_a_killed_run_is_resumed_to_the_same_end(server, kinds, quiet, tmp_path, name, kill):
    counts = Chain(server, kinds[name], quiet(name), tmp_path / "chain", seed=1).run(2, kill)
    assert counts["kills"] == 2 and counts["matches"] >= 1


def test_a_run_of_two_processes_of_which_one_was_killed_is_resumed_to_the_same_end(server, kinds, quiet, tmp_path):
    chain = Chain(server, kinds["loop 2"], quiet("loop 2"), tmp_path / "chain", seed=1)
    assert chain.run(1, kill_inside_saving)["inside saving"] == 1


def test_a_run_that_was_killed_while_it_filled_its_cache_is_resumed_to_the_same_end(server, kinds, quiet, tmp_path):
    counts = Chain(server, kinds["sdxl 1"], quiet("sdxl 1"), tmp_path / "chain", seed=1).run(1, kill_inside_caching)
    assert counts["kills"] == counts["matches"] == 1


@pytest.mark.parametrize(
    "case",
    ["SIGTERM to the trainer", "SIGTERM to one process of two", "second signal to the loop", "clock of the trainer"],
)
def test_a_run_that_was_asked_to_stop_saves_and_is_resumed_to_the_same_end(server, kinds, quiet, tmp_path, case):
    kind = stops.CASES[case][0]
    stops.check(server, case, kinds[kind], quiet(kind), tmp_path / "run")


@pytest.mark.parametrize("case", ["checkpoint that replaces the oldest", "folder", "file"])
def test_whenever_a_process_is_killed_the_old_or_the_new_is_there(server, tmp_path, case):
    stride = 1 if case == "file" else 6
    assert crash_points.kill_everywhere(server, case, tmp_path, stride)["points"] >= 5


@pytest.mark.parametrize("case", crash_points.CASES)
def test_what_has_its_final_name_is_on_the_disk(server, tmp_path, case):
    calls = crash_points.logged(server, case, tmp_path)
    crash_points.check_durability(case, calls, tmp_path / "work")
