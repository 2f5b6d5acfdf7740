import json
import sys

import numpy as np
import pytest

from benchmarks import training_step
from benchmarks.contest import Result
from benchmarks.peak import Peak
from benchmarks.training_step import (
    COMPILED,
    DIFFUSERS,
    EAGER,
    OFFICIAL,
    OURS,
    OURS_BF16,
    OURS_LAUNCHED,
    OURS_RECOMPUTE,
    PPDIFFUSERS,
    Workload,
    best,
    contestants,
    tabulate_targets,
)
from dit.configuration import DiTConfig
from latent_diffusion.errors import InputError
from latent_diffusion.weights import transpose_linear
from tests.cli.commands import TINY
from tests.peer import needs_peer, run_peer
from uvit_ldm.configuration import UViTConfig

DIT = DiTConfig(**TINY, timestep_convention="official")
UVIT = UViTConfig(8, 2, 4, 4, 2, 16, clip_dim=12, num_text_tokens=5)

PEAK = Peak("cpu", {"Paddle": 1e11, "PyTorch": 2e11})


def result(name: str, seconds: float, peak: int = 10, rest: int = 5, **figures) -> Result:
    return Result(
        name, [{"seconds": [seconds], "peak_memory": peak, "memory_at_rest": rest, "gradients": 4, **figures}]
    )


def by_name(*results: Result) -> dict[str, Result]:
    return {each.name: each for each in results}


@pytest.fixture
def run_tiny(tmp_path, monkeypatch):
    """Runs the benchmark with a tiny DiT and only the named contestants; returns what it writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training_step, "WORKLOADS", {"tiny": Workload(DIT, 4)})
    monkeypatch.setattr(training_step, "matrix_peak", lambda device, peer: PEAK)
    monkeypatch.setattr(training_step, "peer_python", lambda: None)
    monkeypatch.setattr(sys, "argv", ["training_step", "--models", "tiny", "--rounds", "1", "--steps", "2"])

    def run(*names: str) -> dict:
        def some(*arguments):
            return [contestant for contestant in contestants(*arguments) if contestant.name in names]

        monkeypatch.setattr(training_step, "contestants", some)
        training_step.main()
        return json.loads((tmp_path / "output/bench/training-step.json").read_text())

    return run


def test_a_step_is_measured_in_one_process_and_in_several(run_tiny, capsys):
    written = run_tiny(OURS, OURS_LAUNCHED)
    rows = {row[0]: row[1:] for row in written["tables"][0]["rows"]}
    assert set(rows) <= {OURS, OURS_LAUNCHED} and OURS in rows
    seconds, least, most, over_pytorch, share, memory, activations = rows[OURS]
    assert 0 < least <= seconds <= most and over_pytorch is None
    assert share == pytest.approx(Workload(DIT, 4).flops / seconds / 2e11)
    assert 0.1 < memory < 2 and activations < memory
    run = written["runs"]["tiny"][OURS][0]
    assert len(run["seconds"]) == len(run["ema_seconds"]) == 2
    assert run["peak_memory"] > run["memory_at_rest"] > run["gradients"] > 0
    assert f"{OURS} ran with {run['settings']}" in capsys.readouterr().out


def test_a_contestant_that_fails_has_a_row_and_fails_the_benchmark(run_tiny, monkeypatch, tmp_path, capsys):
    (tmp_path / "ours_step.py").write_text("raise SystemExit('no such model')")
    monkeypatch.setattr(training_step, "PEERS", tmp_path)
    with pytest.raises(SystemExit, match="1"):
        run_tiny(OURS)
    captured = capsys.readouterr()
    assert "failed: no such model" in captured.out and "error: 1 failed: this project;" in captured.err


def test_pytorch_counts_by_its_fastest_eager_contestant():
    found = by_name(result(DIFFUSERS, 3.0), result(OFFICIAL, 2.0), result(DIFFUSERS + COMPILED, 1.0))
    assert best(found, EAGER).name == OFFICIAL
    assert best(found, COMPILED).name == DIFFUSERS + COMPILED
    found[OFFICIAL].failure = "no memory"
    assert best(found, EAGER).name == DIFFUSERS
    assert best({}, EAGER) is None
    smaller = by_name(result(DIFFUSERS, 1.0, 30), result(OFFICIAL, 2.0, 20))
    assert best(smaller, EAGER, lambda each: each.peak_memory).name == OFFICIAL


def test_targets_are_met_or_missed_with_their_ratio():
    found = by_name(
        result(OURS, 1.9, 24, 10, ema_seconds=[0.019, 0.019]),
        result(OURS_BF16, 0.95),
        result(OURS_RECOMPUTE, 2.85, 17, 10),
        result(PPDIFFUSERS, 9.5),
        result(OFFICIAL, 2.0, 30),
        result(OFFICIAL + COMPILED, 2.0),
    )
    rows = {row[1]: row[2:] for row in tabulate_targets({"tiny": found}).rows}
    assert rows == {
        "time: this project / official code": [pytest.approx(0.95), 0.95, "met"],
        "time: this project / ppdiffusers": [pytest.approx(0.2), 0.35, "met"],
        "time: this project / official code, compiled": [pytest.approx(0.95), 0.8, "missed"],
        "peak memory: this project / official code": [0.8, 1.0, "met"],
        "activations: this project, recompute / this project": [0.3, 0.4, "met"],
        "time: this project, recompute / this project": [pytest.approx(1.5), 1.35, "missed"],
        "time: this project, bf16 / this project": [pytest.approx(0.5), 1 / 1.3, "met"],
        "time: this project, EMA / step": [pytest.approx(0.01), 0.03, "met"],
    }


def test_what_failed_is_not_judged():
    found = by_name(result(OURS, 1.0, ema_seconds=[0.01]), result(PPDIFFUSERS, 2.0))
    found[PPDIFFUSERS].failure = "no memory"
    assert [row[1] for row in tabulate_targets({"tiny": found}).rows] == ["time: this project, EMA / step"]


def test_pytorch_is_left_out_where_it_is_not_and_launching_where_the_batch_does_not_divide(monkeypatch, tmp_path):
    monkeypatch.setattr(training_step.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(training_step, "has_bfloat16", lambda: False)
    names = [contestant.name for contestant in contestants(Workload(DIT, 3), "cpu", 1, None)]
    assert names == [OURS, OURS_RECOMPUTE, PPDIFFUSERS, "ppdiffusers, recompute"]
    names = [contestant.name for contestant in contestants(Workload(UVIT, 4), "cpu", 1, tmp_path)]
    assert (
        OURS_BF16 not in names
        and OURS_LAUNCHED in names
        and "official code, bf16, compiled" in names
        and DIFFUSERS not in names
    )


# What PyTorch computes with the networks and the loss of benchmarks/peers: outputs, and the loss of DiT at t 0 and 700.
COMPUTE = """
import json, sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
from torch_dit import DiT
from torch_objectives import LearnedRangeDDPM, NoisePrediction
from torch_uvit import UViT
configs, out = json.load(open("configs.json")), {}
for name, network, objective in ("dit", DiT, LearnedRangeDDPM), ("uvit", UViT, NoisePrediction):
    weights = {key: torch.from_numpy(value) for key, value in np.load(f"{name}.npz").items()}
    inputs = {key: torch.from_numpy(value) for key, value in np.load(f"{name}_inputs.npz").items()}
    model = network(configs[name])
    model.load_state_dict(weights)
    with torch.no_grad():
        out[name] = model(inputs["x"], inputs["t"], inputs["condition"]).numpy()
        denoise = lambda x, t: model(x, t, inputs["condition"])
        out[name + " loss"] = objective("cpu").loss(denoise, inputs["x"], inputs["t"], inputs["noise"]).numpy()
np.savez("out.npz", **out)
"""


@needs_peer
def test_the_networks_and_losses_in_pytorch_are_those_of_this_project(tmp_path):
    import paddle

    from dit import objective as dit_objective
    from dit.modeling import DiT
    from uvit_ldm import objective as uvit_objective
    from uvit_ldm.modeling import UViT

    paddle.seed(0)
    rng = np.random.default_rng(0)
    expected = {}
    systems = {"dit": (DiT(DIT), dit_objective, [0, 700]), "uvit": (UViT(UVIT), uvit_objective, [1, 700])}
    for name, (model, module, t) in systems.items():
        for p in model.parameters():
            paddle.nn.initializer.Normal(0.0, 0.1)(p)
        inputs = {key: rng.standard_normal([2, 4, 8, 8], dtype=np.float32) for key in ("x", "noise")}
        inputs["t"] = np.array(t)
        inputs["condition"] = np.array([3, 10]) if name == "dit" else rng.standard_normal([2, 5, 12], dtype=np.float32)
        weights = {key: value.numpy() for key, value in model.state_dict().items()}
        np.savez(tmp_path / f"{name}.npz", **transpose_linear(weights))
        np.savez(tmp_path / f"{name}_inputs.npz", **inputs)
        x, t, noise, condition = (paddle.to_tensor(inputs[key]) for key in ("x", "t", "noise", "condition"))
        with paddle.no_grad():
            expected[name] = model(x, t, condition).numpy()
            losses = module.make_objective().losses(lambda x, t, m=model, c=condition: m(x, t, c), x, t, noise)
            expected[f"{name} loss"] = losses["loss"].mean().numpy()
    (tmp_path / "configs.json").write_text(json.dumps({"dit": DIT.to_dict(), "uvit": UVIT.to_dict()}))
    run_peer(tmp_path, "-c", COMPUTE, str(training_step.PEERS))
    with np.load(tmp_path / "out.npz") as out:
        for name, values in expected.items():
            np.testing.assert_allclose(out[name], values, rtol=1e-4, atol=1e-4, err_msg=name)


def test_an_unknown_model_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training_step", "--models", "DiT-S/3"])
    with pytest.raises(InputError, match="DiT-S/3"):
        training_step.parse_arguments()
