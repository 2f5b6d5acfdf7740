import json
import sys

import pytest

from benchmarks import contest
from benchmarks.contest import Contestant, Result, compete, peer_python, raise_failures, rotated
from latent_diffusion.errors import InputError


def contestant(name: str, code: str, **variables: str) -> Contestant:
    return Contestant(name, [sys.executable, "-c", code], variables)


def printing(**figures) -> str:
    return f"print('loading'); print({json.dumps(json.dumps(figures))}); print('done')"


def test_figures_are_of_all_rounds():
    runs = [
        {"seconds": [3.0, 1.0], "peak_memory": 5, "parameters": 7, "ema_seconds": [1, 2]},
        {"seconds": [2.0, 9.0], "peak_memory": 4, "parameters": 7, "ema_seconds": [9]},
    ]
    result = Result("a", runs)
    assert (result.median, result.min, result.max, result.peak_memory) == (2.5, 1.0, 9.0, 5)
    assert (result.figure("parameters"), result.figure("ema_seconds"), result.figure("other")) == (7, 2, None)


def test_the_order_is_rotated_each_round():
    assert [rotated("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    order = []
    entries = [contestant(name, printing(seconds=[1.0])) for name in "ab"]
    compete(entries, 2, lambda number, result: order.append((number, result.name)))
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_a_contestant_that_fails_is_named_and_the_others_go_on():
    entries = [contestant("bad", "raise SystemExit('no memory left')"), contestant("good", printing(seconds=[2.0]))]
    results = compete(entries, 2)
    assert results["bad"].failure == "no memory left"
    assert results["good"].seconds == [2.0, 2.0] and results["good"].median == 2.0
    with pytest.raises(InputError, match="1 failed: bad"):
        raise_failures(results.values())
    raise_failures([results["good"]])


def test_a_launched_contestant_fails_with_what_its_process_said():
    code = "import sys; print('error: no such model'); print('LAUNCH ERROR Container failed', file=sys.stderr); exit(1)"
    assert compete([contestant("a", code)], 1)["a"].failure == "error: no such model"


def test_a_contestant_that_is_killed_says_how_it_ended():
    assert compete([contestant("a", "import os; os.kill(os.getpid(), 9)")], 1)["a"].failure == "exit status -9"


def test_what_prints_no_figures_has_failed():
    assert compete([contestant("silent", "print('hello')")], 1)["silent"].failure == "printed no JSON object"


def test_a_program_that_is_missing_is_named():
    assert "nowhere/python cannot be run" in compete([Contestant("a", ["nowhere/python"])], 1)["a"].failure


def test_a_contestant_has_its_own_variables_and_none_that_this_process_added(monkeypatch):
    monkeypatch.setenv("ADDED_LATER", "yes")
    code = (
        "import os; print('{\"seconds\": [' + os.environ['OWN'] + str(len(os.environ.get('ADDED_LATER', ''))) + ']}')"
    )
    assert compete([contestant("a", code, OWN="4")], 1)["a"].seconds == [40]


def test_without_pytorch_a_note_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("PEER_PYTHON", raising=False)
    monkeypatch.setattr(contest, "PEERS_ENVIRONMENT", tmp_path / "python")
    assert peer_python() is None
    assert "`make peers` makes it" in capsys.readouterr().err
    (tmp_path / "python").touch()
    assert peer_python() == tmp_path / "python"


def test_a_program_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(contest, "LIMIT", 0.5)
    assert compete([contestant("a", "import time; time.sleep(60)")], 1)["a"].failure.startswith("no end after")
