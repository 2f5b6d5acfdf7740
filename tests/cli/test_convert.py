"""Weights from the official layout to pipelines and back, and what PyTorch's own libraries make of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from latent_diffusion.weights import read_torch, write_paddle
from tests.peer import needs_peer, run_peer

from ..conftest import DATA
from .commands import CONVERT, REPOSITORY, Command
from .forks import run, run_all

CONVERT_BACK = str(REPOSITORY / "scripts" / "convert_ppdiffusers_to_dit.py")


@pytest.fixture(scope="module")
def converted(tmp_path_factory, make_dit, vae_folder):
    """A folder with the reference weights in each format, and what the commands said."""
    folder = tmp_path_factory.mktemp("converted")
    own = make_dit("ppdiffusers")
    own.config.save(folder / "config.json")
    write_paddle(folder / "model_state.pdparams", own.state_dict())

    def pipeline(name: str, source: object, *flags: str) -> Command:
        output = ["--output_path", name, "--vae_name_or_path", str(vae_folder)]
        return Command([CONVERT, "--model_file", str(source), *output, *flags], folder)

    def official(name: str, source: object, *flags: str) -> Command:
        return Command([CONVERT_BACK, "--model_file", str(source), "--output_path", name, *flags], folder)

    given = ("--config_file", "config.json")
    rounds = (
        {
            "diffusers": pipeline("diffusers", DATA / "official.pt", *given, "--format", "diffusers"),
            "exact": pipeline("exact", DATA / "official.pt", *given, "--exact"),
            "copy.pt": official("copy.pt", DATA / "official.pt", *given),
        },
        {
            "ppdiffusers": pipeline("ppdiffusers", "diffusers"),
            "from_exact.pt": official("from_exact.pt", "exact"),
            "from_diffusers.pt": official("from_diffusers.pt", "diffusers"),
            "copy.safetensors": official("copy.safetensors", "copy.pt"),
        },
        {
            "from_ppdiffusers.pt": official("from_ppdiffusers.pt", "ppdiffusers"),
            "from_safetensors.pt": official("from_safetensors.pt", "copy.safetensors"),
            "ours.pt": official("ours.pt", "model_state.pdparams"),
        },
    )
    said = {}
    for commands in rounds:
        said |= {name: result.ok().out for name, result in run_all(commands).items()}
    return folder, said


@pytest.mark.parametrize("source", ["copy", "from_exact", "from_diffusers", "from_ppdiffusers", "from_safetensors"])
def test_official_weights_come_back_bit_by_bit(converted, source):
    expected, found = read_torch(DATA / "official.pt"), read_torch(converted[0] / f"{source}.pt")
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_each_conversion_says_the_convention(converted):
    said = converted[1]
    for name in said.keys() - {"diffusers", "ppdiffusers", "exact", "ours.pt"}:
        assert f"wrote {name}; its timestep convention is official" in said[name] and "note:" not in said[name]
    assert "wrote ours.pt; its timestep convention is ppdiffusers" in said["ours.pt"]
    assert "note: the official code knows only its own timestep frequencies" in said["ours.pt"]
    for name in ("diffusers", "ppdiffusers"):
        assert "note: the network has the official timestep convention" in said[name]
        config = json.loads((converted[0] / name / "transformer/config.json").read_text())
        assert config["_timestep_convention"] == "official"
    assert "note:" not in said["exact"]


def test_an_output_of_another_kind_is_refused(tmp_path, make_dit):
    make_dit().config.save(tmp_path / "config.json")
    arguments = ["--model_file", str(DATA / "official.pt"), "--config_file", "config.json"]
    result = run(Command([CONVERT_BACK, *arguments, "--output_path", "weights.pdparams"], tmp_path))
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert line == "error: the output weights.pdparams is not a weight file: its name must end in .pt or .safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# What the other environment is asked: the networks' outputs, and whether PyTorch takes the files.
RUN_PEER = """
import json, sys
import numpy as np, torch
from diffusers import DiTPipeline
from safetensors.torch import load_file

original = torch.load(sys.argv[1], weights_only=True)
options = ({"weights_only": True}, {"weights_only": False}, {"mmap": True})
files = [torch.load("copy.pt", **chosen) for chosen in options]
files.append(load_file("copy.safetensors"))
same = [set(f) == set(original) and all(torch.equal(f[name], original[name]) for name in original) for f in files]

pipe = DiTPipeline.from_pretrained("diffusers")
pipe.set_progress_bar_config(disable=True)
arrays = np.load(sys.argv[2])
with torch.no_grad():
    x, t, y = (torch.from_numpy(arrays[name]) for name in "xty")
    out = pipe.transformer(x, timestep=t, class_labels=y).sample
images = pipe([2, 8], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
np.savez("peer.npz", out=out.numpy(), images=images)
print(json.dumps(same))
"""


@needs_peer
def test_pytorch_and_diffusers_take_what_is_written(converted, golden):
    """The expected output is that of the weights with diffusers' frequencies, computed with the official code."""
    folder = converted[0]
    output = run_peer(folder, "-c", RUN_PEER, str(DATA / "official.pt"), str(DATA / "forward.npz"))
    assert json.loads(output.splitlines()[-1]) == [True] * 4
    with np.load(Path(folder) / "peer.npz") as found:
        assert np.abs(found["out"] - golden("forward_time127")["out"]).max() <= 1e-4
        assert found["images"].shape == (2, 64, 64, 3) and np.isfinite(found["images"]).all()


def test_a_pipeline_is_not_replaced_while_it_is_read(tmp_path):
    (tmp_path / "pipeline/transformer").mkdir(parents=True)
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    done = run(Command([CONVERT, "--model_file", "pipeline/transformer", "--output_path", "pipeline"], tmp_path))
    assert done.code == 1 and "error: pipeline would be replaced, and pipeline/transformer is in it" in done.err
