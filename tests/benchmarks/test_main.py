import subprocess
import sys

import pytest

from benchmarks import __main__ as bench
from benchmarks.report import ROOT
from latent_diffusion.errors import InputError


@pytest.fixture
def calls(monkeypatch):
    """Names of the benchmarks that would be run; "scaling" fails."""
    names = []

    def run(command, **options):
        names.append(command[1].stem)
        return subprocess.CompletedProcess(command, int(names[-1] == "scaling"))

    monkeypatch.setattr(bench.subprocess, "run", run)
    return names


def test_a_benchmark_that_fails_does_not_stop_the_others_and_is_named(calls, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    with pytest.raises(SystemExit, match="1"):
        bench.main()
    assert calls == list(bench.NAMES)
    assert "error: 1 of the benchmarks failed: scaling" in capsys.readouterr().err


def test_only_those_that_are_named_are_run(calls, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "loading", "startup"])
    bench.main()
    assert calls == ["loading", "startup"]


def test_an_unknown_benchmark_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "speed"])
    with pytest.raises(InputError, match="no benchmark 'speed'"):
        bench.parse_arguments()


def test_every_benchmark_that_make_bench_runs_is_there():
    assert [name for name in bench.NAMES if not (ROOT / "benchmarks" / f"{name}.py").is_file()] == []


@pytest.mark.parametrize("start", [["-m", "benchmarks.training_step"], ["benchmarks/training_step.py"]])
def test_a_benchmark_starts_as_a_module_and_as_a_file(start):
    done = subprocess.run([sys.executable, *start, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--rounds" in done.stdout, done.stderr
