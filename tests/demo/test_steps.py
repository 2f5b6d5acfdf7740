import pytest

from demo import steps
from demo.steps import Steps, begin, check_least
from latent_diffusion.errors import InputError


def test_each_step_is_numbered_and_printed_as_the_command_it_is(capfd):
    run = Steps(2)
    run.run("say it", """-c "print('two words')" """)
    run.begin("look")
    lines = capfd.readouterr().out.split("\n")
    assert [line for line in lines if line] == [
        "[1/2] say it",
        """$ python -c 'print('"'"'two words'"'"')'""",
        "two words",
        "[2/2] look",
    ]


def test_a_failing_step_stops_the_demo(capfd):
    with pytest.raises(InputError, match="-c ended with exit status 3"):
        Steps(1).run("fail", "-c 'raise SystemExit(3)'")


def test_folders_of_an_earlier_run_are_emptied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "output/stale").touch()
    begin(tmp_path / "output", tmp_path / "data/demo")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "demo", "output"]


def test_a_figure_below_its_promise_is_an_error():
    check_least([(0.85, 0.85, "of the samples")])
    with pytest.raises(InputError, match="only 84.9% of the samples; at least 85% was promised"):
        check_least([(0.9, 0.5, "of them"), (0.849, 0.85, "of the samples")])
