"""The export is compared with the network in processes that have nothing of this project but the folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors import safe_open

from dit.configuration import DiTConfig
from dit.export import IMAGENET_LABELS, export_pipeline, read_labels, to_ppdiffusers, write_torch_weights
from dit.modeling import DiT
from latent_diffusion.errors import InputError
from latent_diffusion.vae import load_vae
from latent_diffusion.weights import read_weights

from ..conftest import DATA, TINY

REPOSITORY = Path(__file__).parents[2]
TINY_VAE = DATA.parent / "vae" / "vae_tiny"

RUN_TRANSFORMER = """
import sys
import numpy as np, paddle
from ppdiffusers import DiTPipeline
arrays = np.load(sys.argv[1])
results = {}
for folder in sys.argv[3:]:
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.transformer.eval()
    x, t, y = (paddle.to_tensor(arrays[name]) for name in "xty")
    out = pipe.transformer(x, timestep=t, class_labels=y).sample
    results[folder] = out.detach().numpy()
np.savez(sys.argv[2], **results)
try:
    import dit
    print("can import dit")
except ImportError:
    print("cannot import dit")
"""

RUN_PIPELINE = """
import json, sys
import numpy as np, paddle
from ppdiffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler
pipe = DiTPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
found = {"ids": pipe.get_label_ids(["two", "eight", "nought"]), "images": {}}
for cls in (DDIMScheduler, DPMSolverMultistepScheduler):
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    for guidance in (1.0, 4.0):
        paddle.seed(0)
        images = pipe([2, 8], guidance_scale=guidance, num_inference_steps=3, output_type="np").images
        found["images"][f"{cls.__name__} {guidance:g}"] = [list(images.shape), bool(np.isfinite(images).all())]
print(json.dumps(found))
"""

DIGITS = {0: "zero, nought", 1: "one", 2: "two", 8: "eight"}


def run(code: str, *arguments: object, folder: Path, pythonpath: str = "") -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if pythonpath:
        environment["PYTHONPATH"] = pythonpath
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def exports(make_dit, vae_folder, tmp_path_factory):
    """A folder with the reference model exported in each way, and the differences the export reported."""
    root = tmp_path_factory.mktemp("exports")
    differences = {}
    for name, convention, exact in (
        ("official", "official", False),
        ("exact", "official", True),
        ("ppdiffusers", "ppdiffusers", False),
    ):
        model = make_dit(convention)
        differences[name] = export_pipeline(model, str(vae_folder), root / name, DIGITS, exact=exact)
    return root, differences


@pytest.fixture(scope="module")
def outputs(exports, golden, tmp_path_factory):
    """What the exported transformers give for the inputs of forward.npz, each in a process of its kind."""
    root, folder, arrays = exports[0], tmp_path_factory.mktemp("elsewhere"), golden("forward")
    np.savez(folder / "in.npz", **{name: arrays[name] for name in "xty"})
    stock = run(RUN_TRANSFORMER, "in.npz", "stock.npz", root / "official", root / "ppdiffusers", folder=folder)
    assert stock.stdout.splitlines()[-1] == "cannot import dit"
    run(RUN_TRANSFORMER, "in.npz", "exact.npz", root / "exact", folder=folder, pythonpath=str(REPOSITORY))
    results = dict(np.load(folder / "stock.npz")) | dict(np.load(folder / "exact.npz"))
    return {Path(name).name: out for name, out in results.items()}


def test_an_official_network_in_the_stock_class_has_the_other_frequencies(outputs, golden):
    assert np.abs(outputs["official"] - golden("forward_time127")["out"]).max() <= 2e-5
    assert np.abs(outputs["official"] - golden("forward")["out"]).max() > 0.5


def test_the_exact_export_of_an_official_network_is_exact(outputs, golden):
    assert np.abs(outputs["exact"] - golden("forward")["out"]).max() <= 2e-5


def test_a_network_of_the_ppdiffusers_convention_exports_exactly(outputs, make_dit, golden):
    arrays = golden("forward")
    with paddle.no_grad():
        own = make_dit("ppdiffusers")(*(paddle.to_tensor(arrays[name]) for name in "xty")).numpy()
    assert np.abs(outputs["ppdiffusers"] - own).max() <= 1e-5


def test_the_export_reports_the_difference(exports):
    differences = exports[1]
    assert differences["ppdiffusers"] <= 1e-5 and differences["exact"] <= 1e-5
    assert differences["official"] > 0.1


def test_the_tree_is_the_published_one(exports):
    root = exports[0] / "ppdiffusers"
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/model_state.pdparams",
        "vae/config.json",
        "vae/model_state.pdparams",
    }
    index = json.loads((root / "model_index.json").read_text())
    assert index["transformer"] == ["ppdiffusers", "Transformer2DModel"]
    assert index["id2label"] == {str(key): value for key, value in DIGITS.items()}
    assert json.loads((root / "transformer/config.json").read_text())["norm_eps"] == 1e-6


def test_only_the_exact_export_needs_this_project(exports):
    for name, library in (("official", "ppdiffusers"), ("exact", "dit.exact")):
        assert json.loads((exports[0] / name / "model_index.json").read_text())["transformer"][0] == library


def test_the_pipeline_knows_labels_and_runs_with_both_schedulers(exports, tmp_path):
    done = run(RUN_PIPELINE, exports[0] / "ppdiffusers", folder=tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ids"] == [2, 8, 0]
    assert len(found["images"]) == 4
    assert all(image == [[2, 64, 64, 3], True] for image in found["images"].values())


def test_safetensors_on_request(make_mini_dit, vae_folder, tmp_path):
    export_pipeline(make_mini_dit("ema"), str(vae_folder), tmp_path / "out", None, safe_serialization=True)
    files = {str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"transformer/diffusion_paddle_model.safetensors", "vae/diffusion_paddle_model.safetensors"} <= files
    assert not any(name.endswith(".pdparams") for name in files)
    assert not (json.loads((tmp_path / "out/model_index.json").read_text()).get("id2label"))


def test_a_folder_for_diffusers_is_as_diffusers_writes_it(make_dit, vae_folder, tmp_path):
    root = tmp_path / "out"
    export_pipeline(make_dit("ppdiffusers"), str(vae_folder), root, DIGITS, library="diffusers")
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert json.loads((root / "model_index.json").read_text()) == {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "id2label": {str(key): value for key, value in DIGITS.items()},
    }
    with safe_open(root / "transformer/diffusion_pytorch_model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("proj_out_1.weight").get_shape() == [128, 64]  # (out, in)
        assert file.get_slice("transformer_blocks.0.ff.net.0.proj.weight").get_shape() == [256, 64]
    config = json.loads((root / "transformer/config.json").read_text())
    assert config["_class_name"] == "DiTTransformer2DModel" and config["norm_eps"] == 1e-6


def test_the_vae_survives_the_way_to_diffusers(make_mini_dit, vae_folder, tmp_path):
    export_pipeline(make_mini_dit("ema"), str(vae_folder), tmp_path / "out", None, library="diffusers")
    own, again = load_vae(str(vae_folder)), load_vae(str(tmp_path / "out" / "vae"))
    assert again.config.scaling_factor == own.config.scaling_factor
    for name, tensor in own.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)


def test_a_vae_of_diffusers_is_written_as_diffusers_wrote_it(tmp_path):
    write_torch_weights(tmp_path / "vae.safetensors", load_vae(str(TINY_VAE)))
    expected = read_weights(TINY_VAE / "diffusion_pytorch_model.safetensors")
    found = read_weights(tmp_path / "vae.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_diffusers_has_no_exact_class(make_mini_dit, vae_folder, tmp_path):
    with pytest.raises(InputError, match="leave out --exact"):
        export_pipeline(make_mini_dit("ema"), str(vae_folder), tmp_path / "out", None, exact=True, library="diffusers")


def test_a_failed_export_leaves_the_old_folder(make_mini_dit, vae_folder, tmp_path, monkeypatch):
    from ppdiffusers.pipelines.dit.pipeline_dit import DiTPipeline

    def fail(self, folder, **settings):
        (Path(folder) / "part").touch()
        raise OSError("disk full")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_index.json").touch()
    monkeypatch.setattr(DiTPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_pipeline(make_mini_dit("ema"), str(vae_folder), tmp_path / "out", None)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/model_index.json"]


def test_labels_beyond_the_classes_are_the_null_class(make_dit):
    """ppdiffusers' null class is 1000: it must be the row of this network's."""
    model = make_dit("ppdiffusers")
    own = model.state_dict()["y_embedder.embedding_table.weight"].numpy()
    tables = [value.numpy() for name, value in to_ppdiffusers(model).state_dict().items() if "embedding_table" in name]
    assert len(tables) == model.config.num_layers
    for table in tables:
        assert table.shape == (1001, 64)
        np.testing.assert_array_equal(table[:10], own[:10])
        np.testing.assert_array_equal(table[10:], np.repeat(own[10:], 991, axis=0))


@pytest.mark.parametrize(
    ("change", "message"), [({"num_classes": 1001}, "1001 classes cannot be exported"), ({"mlp_ratio": 2.0}, "MLP")]
)
def test_a_network_that_the_class_cannot_express_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        to_ppdiffusers(DiT(DiTConfig(**TINY | change)))


def test_a_vae_of_other_channels_is_refused(vae_folder, tmp_path):
    model = DiT(DiTConfig(**TINY | {"in_channels": 3}))
    with pytest.raises(InputError, match="has 4 latent channels, the model 3"):
        export_pipeline(model, str(vae_folder), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_a_vae_of_another_downsampling_is_refused(make_mini_dit, tmp_path):
    with pytest.raises(InputError, match="vae_tiny makes latents of 1/2 of the image's side; the model takes 1/8"):
        export_pipeline(make_mini_dit("ema"), str(TINY_VAE), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_1000_classes_have_the_names_of_imagenet():
    labels = read_labels(None, 1000)
    assert sorted(labels) == list(range(1000))
    names = {name.strip(): key for key, text in labels.items() for name in text.split(",")}
    assert names["white shark"] == 2 and names["tench"] == 0 and names["toilet tissue"] == 999
    assert read_labels(None, 10) is None
    assert IMAGENET_LABELS.is_file()


@pytest.mark.parametrize("text", ['["zero", "one"]', '{"0": "zero", "1": "one"}'])
def test_labels_are_a_list_or_an_object(tmp_path, text):
    (tmp_path / "labels.json").write_text(text)
    assert read_labels(tmp_path / "labels.json", 2) == {0: "zero", 1: "one"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"labels\.json must hold a JSON object"),
        ('"text"', r"labels\.json must hold a JSON object"),
        ("3", r"labels\.json must hold a JSON object"),
        ('{"zero": 0}', r"labels\.json must hold a JSON object"),
        ('{"2": "two"}', r"labels\.json names class 2; the model has classes 0 to 1"),
        ('["a", "b", "c"]', r"labels\.json names class 2"),
        ('{"-1": "minus"}', r"labels\.json names class -1"),
    ],
)
def test_a_bad_label_file_is_named(tmp_path, text, message):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_labels(tmp_path / "labels.json", 2)


def test_a_missing_label_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the label file .*labels\.json"):
        read_labels(tmp_path / "labels.json", 2)
