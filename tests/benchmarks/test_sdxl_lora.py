import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sdxl_lora
from benchmarks.contest import PEERS, Result
from benchmarks.sdxl_lora import DIFFUSERS, DIFFUSERS_CHECKPOINTING, OURS, OURS_RECOMPUTE, Setting
from latent_diffusion.errors import InputError
from tests.peer import needs_peer

TINY = sdxl_lora.UNET | {
    "sample_size": 8,
    "block_out_channels": [16, 32, 32],
    "transformer_layers_per_block": [1, 1, 1],
    "layers_per_block": 1,
}
FLAGS = ("UNet2DConditionModel", json.dumps(TINY), "--batch-size", "2")
FLAGS += ("--warm-up", "1", "--steps", "2", "--device", "cpu")


def result(name: str, seconds: list[float], peak: int = 2**31) -> Result:
    return Result(name, [{"seconds": seconds, "peak_memory": peak, "memory_at_rest": 2**30}])


def check_figures(line: str) -> None:
    """What a program prints of two timed steps."""
    found = json.loads(line)
    assert len(found["seconds"]) == 2 and found["peak_memory"] > found["memory_at_rest"] > 0


@pytest.mark.parametrize("switch", [[], ["--recompute"]])
def test_a_step_of_this_project_is_measured(monkeypatch, capsys, switch):
    monkeypatch.syspath_prepend(PEERS)
    monkeypatch.setattr(sys, "argv", ["ours_lora_step.py", *FLAGS, *switch])
    runpy.run_path(str(PEERS / "ours_lora_step.py"), run_name="__main__")
    check_figures(capsys.readouterr().out.splitlines()[-1])


@needs_peer
def test_a_step_of_diffusers_is_measured():
    program = subprocess.Popen(
        [os.environ["PEER_PYTHON"], PEERS / "diffusers_lora_step.py", *FLAGS, "--checkpointing"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # It takes a thread for each of its cores, which wait for each other where others use them.
    os.sched_setaffinity(program.pid, {min(os.sched_getaffinity(0))})
    out, err = program.communicate(timeout=60)
    assert program.returncode == 0, err
    check_figures(out.splitlines()[-1])


def test_diffusers_is_left_out_where_it_is_not():
    names = [contestant.name for contestant in sdxl_lora.contestants(1, 2, "cpu", None)]
    assert names == [OURS, OURS_RECOMPUTE]
    names = [contestant.name for contestant in sdxl_lora.contestants(1, 2, "cpu", Path("python"))]
    assert names == [OURS, OURS_RECOMPUTE, DIFFUSERS, DIFFUSERS_CHECKPOINTING]


def test_rates_and_ratios_are_of_the_medians():
    results = {each.name: each for each in (result(OURS, [1.0, 9.0, 0.5]), result(DIFFUSERS, [2.0, 2.0]))}
    table = sdxl_lora.tabulate(2, results)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["s/step"], row["min"], row["max"]) == (1.0, 0.5, 9.0)
    assert (row["FPS"], row["over diffusers"], row["peak memory, GiB"], row["activations, GiB"]) == (2.0, 0.5, 2, 1)
    results[DIFFUSERS].failure = "no memory"
    table = sdxl_lora.tabulate(2, results)
    assert table.rows[0][table.columns.index("over diffusers")] is None and table.rows[1][1] == "failed: no memory"


@pytest.fixture
def commands(monkeypatch) -> list[list]:
    """Command lines that would be run; each prints an FPS twice that of the one before, from 1."""
    found = []

    def printed(command, folder, environment):
        found.append([*map(str, command), environment["OMP_NUM_THREADS"]])
        return f"step 7/7: loss 1\nfinal loss 0.1, FPS {2.0 ** (len(found) - 1):.2f} images per second, steady state\n"

    monkeypatch.setattr(sdxl_lora, "printed", printed)
    return found


def test_the_command_is_run_with_caches_and_without_in_one_process_and_two(commands, monkeypatch):
    monkeypatch.setattr(sdxl_lora.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(sdxl_lora, "write_pipeline", lambda folder: None)
    monkeypatch.setattr(sdxl_lora, "write_captioned_images", lambda folder: None)
    table = sdxl_lora.measure_command("cpu", 4)
    shapes = [[1, 1], [1, 3], [2, 1]]
    expected = [[*shape, encoders] for encoders in ("in every step", "cached") for shape in shapes]
    assert [row[:3] for row in table.rows] == expected
    assert [row[3:] for row in table.rows] == [[1, 1], [2, 2], [4, 4], [8, 1], [16, 2], [32, 4]]
    assert ["--cache_latents" in command for command in commands] == [False] * 3 + [True] * 3
    assert ["--nproc_per_node" in command for command in commands] == [False, False, True] * 2
    assert [command[-1] for command in commands] == ["1", "3", "1"] * 2


def test_a_run_that_prints_no_rate_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sdxl_lora, "printed", lambda *arguments: "FPS not measured: too few steps\n")
    with pytest.raises(InputError, match="printed no FPS"):
        sdxl_lora.measure_fps(Setting(1, 1, False), "cpu", 1, tmp_path)


def test_every_image_has_a_caption(tmp_path):
    sdxl_lora.write_captioned_images(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == sdxl_lora.IMAGES
    assert all((tmp_path / line["file_name"]).is_file() and line["text"] for line in lines)
