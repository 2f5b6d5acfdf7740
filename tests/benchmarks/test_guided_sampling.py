import json
import subprocess
import sys
from argparse import Namespace

import pytest

from benchmarks import guided_sampling
from benchmarks.contest import PEERS, Result
from benchmarks.flops import forward_flops
from benchmarks.guided_sampling import DIFFUSERS, OURS, PPDIFFUSERS
from benchmarks.peak import Peak
from dit.configuration import DiTConfig

from ..cli.commands import TINY


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("own", "outcome"), [(1.8, "0.900, at most 0.9: met"), (1.9, "0.950, at most 0.9: missed")])
def test_the_ratio_to_diffusers_is_of_the_medians(in_folder, capsys, own, outcome):
    runs = {OURS: [own, 9.0, 0.1], DIFFUSERS: [2.0, 2.0]}
    results = {name: Result(name, [{"seconds": found, "peak_memory": 2**30}]) for name, found in runs.items()}
    results[PPDIFFUSERS] = Result(PPDIFFUSERS, failure="no memory")
    config = DiTConfig.from_name("DiT-S/8")
    arguments = Namespace(model="DiT-S/8", batch_size=4, steps=2)
    peak = Peak("cpu", {"Paddle": 1e9})
    guided_sampling.tabulate(results, arguments, config, peak)
    assert outcome in capsys.readouterr().out
    written = json.loads((in_folder / "output/bench/guided-sampling.json").read_text())
    row = dict(zip(written["columns"], written["rows"][0], strict=True))
    assert (row["s/image"], row["s/step"], row["min"]) == (own / 4, own / 2, 0.1 / 4)
    assert row["of peak"] == pytest.approx(2 * 4 * 2 * forward_flops(config) / own / 1e9)
    assert written["rows"][2][1] == "failed: no memory"


def test_this_project_draws_from_the_pipeline_that_is_written(tmp_path):
    guided_sampling.write_pipelines(tmp_path, DiTConfig.from_dict(TINY | {"num_classes": 1000}))
    assert (tmp_path / "diffusers" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    flags = ("--batch-size", "2", "--steps", "2", "--repeats", "2", "--device", "cpu")
    program = [sys.executable, PEERS / "ours_sampling.py", tmp_path / "ppdiffusers", *flags]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["seconds"]) == 2 and found["peak_memory"] > 0
