"""Every source of trained weights, compared with reference values of the code that wrote it."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion import checkpoint
from latent_diffusion.errors import InputError
from latent_diffusion.weights import write_paddle
from tests.conftest import DATA as DIT_DATA
from uvit_ldm.export import PIPELINES, export_pipeline
from uvit_ldm.modeling import UViT
from uvit_ldm.pretrained import build_model, holds_uvit, read_pretrained

# As in test_modeling.py.
OUTPUT = 3e-5


def output(model, arrays: dict[str, np.ndarray]) -> np.ndarray:
    with paddle.no_grad():
        return model(*(paddle.to_tensor(arrays[name]) for name in ("x", "timesteps_float", "context"))).numpy()


def assert_same_weights(found: dict[str, np.ndarray], model: UViT) -> None:
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)


@pytest.fixture
def config_file(tiny_config, tmp_path) -> Path:
    tiny_config.save(tmp_path / "given.json")
    return tmp_path / "given.json"


@pytest.fixture
def other_file(tiny_config, tmp_path) -> Path:
    """A configuration whose weights have the same shapes."""
    dataclasses.replace(tiny_config, num_attention_heads=8, attention_head_dim=8).save(tmp_path / "other.json")
    return tmp_path / "other.json"


# The official code


@pytest.mark.parametrize(("name", "expected"), [("uvit", "out_float"), ("uvit_ema", "out_float_ema")])
def test_an_official_file_gives_the_official_network(official_files, config_file, golden, name, expected):
    arrays = golden("forward")
    model = read_pretrained(official_files[name], config_file).network()
    assert not model.training
    assert np.abs(output(model, arrays) - arrays[expected]).max() <= OUTPUT


@pytest.mark.parametrize(("use_ema", "expected"), [(True, "nnet_ema.pth"), (False, "nnet.pth")])
def test_a_checkpoint_folder_of_the_official_code(official_files, config_file, make_uvit, tmp_path, use_ema, expected):
    folder = tmp_path / "500000.ckpt"
    folder.mkdir()
    shutil.copy(official_files["uvit"], folder / "nnet.pth")
    shutil.copy(official_files["uvit_ema"], folder / "nnet_ema.pth")
    found = read_pretrained(folder, config_file, use_ema)
    assert found.source == folder / expected
    assert_same_weights(found.weights, make_uvit("uvit_ema" if use_ema else "uvit"))


def test_a_checkpoint_folder_of_the_official_code_without_average_says_so(official_files, config_file, tmp_path):
    shutil.copy(official_files["uvit"], tmp_path / "nnet.pth")
    with pytest.raises(InputError, match=r"nnet_ema\.pth does not exist; give .*nnet\.pth itself, or --use_ema False"):
        read_pretrained(tmp_path, config_file)


def test_an_official_file_is_not_described_by_what_lies_beside_it(official_files, tiny_config, other_file, tmp_path):
    """A `config.json` there may be of anything."""
    shutil.copy(official_files["uvit"], tmp_path / "nnet.pth")
    tiny_config.save(tmp_path / "config.json")
    assert read_pretrained(tmp_path / "nnet.pth", other_file).config.num_attention_heads == 8


def test_a_configuration_is_asked_for_where_nothing_tells_it(official_files):
    with pytest.raises(InputError, match=r"no config\.json describes .*uvit\.pth; give .* with --unet_config_file"):
        read_pretrained(official_files["uvit"])


def test_a_configuration_of_other_weights_is_refused(official_files, tiny_config, tmp_path):
    dataclasses.replace(tiny_config, num_layers=6).save(tmp_path / "six.json")
    with pytest.raises(InputError, match=r"uvit\.pth lacks the weight in_blocks\.2\."):
        read_pretrained(official_files["uvit"], tmp_path / "six.json").network()


# This suite's own checkpoints


@pytest.fixture
def output_dir(make_uvit, tmp_path) -> Path:
    """An output folder with two checkpoints; the newer one has the reference weights."""
    for step, raw, averaged in ((9, "uvit_ema", "uvit"), (10, "uvit", "uvit_ema")):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / checkpoint.TRAINER_STATE).write_text("{}")
        make_uvit().config.save(folder / checkpoint.CONFIG)
        write_paddle(folder / checkpoint.MODEL, make_uvit(raw).state_dict())
        write_paddle(folder / checkpoint.EMA_MODEL, make_uvit(averaged).state_dict())
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("source", "use_ema", "expected"),
    [
        ("", True, "uvit_ema"),
        ("", False, "uvit"),
        ("checkpoint-9", True, "uvit"),
        ("checkpoint-10/model_state.pdparams", True, "uvit"),
        ("checkpoint-10/ema_state.pdparams", False, "uvit_ema"),
    ],
)
def test_a_checkpoint_describes_itself(output_dir, tiny_config, make_uvit, source, use_ema, expected):
    found = read_pretrained(output_dir / source, use_ema=use_ema)
    assert found.config == tiny_config
    assert_same_weights(found.weights, make_uvit(expected))


def test_a_configuration_that_contradicts_the_checkpoint_is_refused(output_dir, config_file, other_file):
    assert read_pretrained(output_dir, config_file).weights
    with pytest.raises(
        InputError, match=r"other\.json contradicts .*checkpoint-10/config\.json.* 'num_attention_heads'"
    ):
        read_pretrained(output_dir, other_file)


def test_a_lone_weight_file_takes_the_configuration_that_is_given(output_dir, config_file, tiny_config):
    file = output_dir / "checkpoint-10/model_state.pdparams"
    file.with_name(checkpoint.CONFIG).unlink()
    assert read_pretrained(file, config_file).config == tiny_config
    with pytest.raises(InputError, match=r"no config\.json describes"):
        read_pretrained(file)


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/nnet.pth"])
def test_what_does_not_exist_is_named(tmp_path, missing):
    with pytest.raises(InputError, match=f"{missing} does not exist; give a checkpoint folder"):
        read_pretrained(tmp_path / missing)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"ema_state\.pdparams does not exist"):
        read_pretrained(tmp_path)


# PaddleMIX


def test_the_network_is_taken_out_of_a_checkpoint_of_paddlemix(make_uvit, config_file, tmp_path):
    """It also holds the VAE and the text encoder."""
    others = {
        "vae.quant_conv.weight": paddle.ones([2]),
        "text_encoder.text_model.final_layer_norm.bias": paddle.ones([3]),
    }
    weights = {f"unet.{name}": tensor for name, tensor in make_uvit().state_dict().items()}
    paddle.save(others | weights, str(tmp_path / "model_state.pdparams"))
    found = read_pretrained(tmp_path / "model_state.pdparams", config_file)
    assert_same_weights(found.weights, make_uvit())


# Pipelines


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_pipeline_folder_gives_the_network_back(
    make_uvit, tiny_config, vae_folder, coco_text_encoder, config_file, other_file, tmp_path, pipeline
):
    model = UViT(dataclasses.replace(tiny_config, scaling_factor=0.5))
    model.set_state_dict(make_uvit().state_dict())
    export_pipeline(model, str(vae_folder), coco_text_encoder, tmp_path / "pipeline", pipeline)
    for source in ("", "unet", "unet/model_state.pdparams"):
        found = read_pretrained(tmp_path / "pipeline" / source)
        assert found.config == model.config
        assert_same_weights(found.weights, make_uvit())
    for given, key in ((other_file, "num_attention_heads"), (config_file, "scaling_factor")):
        with pytest.raises(InputError, match=rf"contradicts .*unet/config\.json.* '{key}'"):
            read_pretrained(tmp_path / "pipeline", given)


def test_a_folder_that_ppdiffusers_saved(make_uvit, tiny_config, tmp_path):
    from ppdiffusers.models.uvit_t2i import UViTT2IModel

    arguments = tiny_config.to_dict()
    del arguments["scaling_factor"]
    stock = UViTT2IModel(**arguments)
    stock.set_state_dict(make_uvit().state_dict())
    stock.save_pretrained(str(tmp_path / "safe"))
    stock.save_pretrained(str(tmp_path / "pdparams"), safe_serialization=False)
    written = json.loads((tmp_path / "safe/config.json").read_text())
    assert {"norm_type", "conv", "qk_scale", "drop_rate", "_ppdiffusers_version"} < written.keys()
    for folder in ("safe", "pdparams"):
        found = read_pretrained(tmp_path / folder)
        assert found.config == tiny_config
        assert_same_weights(found.weights, make_uvit())


def test_a_pipeline_without_weights_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=r"the unet folder .*unet holds none of diffusion_pytorch_model"):
        read_pretrained(tmp_path)


# What is none of these


def test_weights_of_a_dit_are_named():
    with pytest.raises(
        InputError, match=r"official\.pt lacks the weight in_blocks\.0\.attn\.qkv\.weight: it holds no U-ViT"
    ):
        read_pretrained(DIT_DATA / "official.pt")


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize("name", ["model_state.pdparams", "nnet_ema.pth"])
def test_a_file_that_would_run_code_is_refused(config_file, tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"in_blocks.0.attn.qkv.weight": Hostile()}, protocol=2))
    with pytest.raises(InputError, match=name):
        read_pretrained(tmp_path / name, config_file)


# Training


def test_training_begins_with_official_weights(official_files, tiny_config, make_uvit):
    model, notes = build_model(tiny_config, official_files["uvit"], None)
    assert model.training and notes == [f"starting from {official_files['uvit']}"]
    assert_same_weights({name: tensor.numpy() for name, tensor in model.state_dict().items()}, make_uvit())


def test_training_begins_with_the_average_of_a_checkpoint(output_dir, tiny_config, make_uvit):
    model, _ = build_model(tiny_config, output_dir, None)
    assert_same_weights({name: tensor.numpy() for name, tensor in model.state_dict().items()}, make_uvit("uvit_ema"))


def test_a_resumed_run_reads_no_other_weights(tiny_config, tmp_path):
    model, _ = build_model(tiny_config, tmp_path / "nowhere", tmp_path)
    assert model.config == tiny_config


def test_trained_weights_of_another_configuration_are_named(output_dir, tiny_config):
    wider = dataclasses.replace(tiny_config, mlp_ratio=2.0)
    with pytest.raises(
        InputError, match=r"ema_state\.pdparams has mlp_ratio 4\.0, the model to be trained 2\.0; choose"
    ):
        build_model(wider, output_dir, None)


def test_a_uvit_is_told_from_a_dit(official_files, uvit, tmp_path):
    assert holds_uvit(official_files["uvit"])
    assert not holds_uvit(DIT_DATA / "official.pt")
    for component, expected in (("unet", True), ("transformer", False)):
        folder = tmp_path / component
        (folder / component).mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        assert holds_uvit(folder) == expected
    with pytest.raises(InputError, match="nowhere does not exist"):
        holds_uvit(tmp_path / "nowhere")
