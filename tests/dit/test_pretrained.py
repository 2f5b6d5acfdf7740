"""Every source of trained weights, compared with reference values of the code that wrote it."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from dit.configuration import DiTConfig
from dit.export import export_pipeline
from dit.modeling import DiT, sincos_positions
from dit.official import save_official
from dit.pretrained import fine_tune, load_dit, read_pretrained, start_from
from latent_diffusion import checkpoint
from latent_diffusion.errors import InputError
from latent_diffusion.transformer import unpatchify
from latent_diffusion.weights import read_torch, read_weights, transpose_linear, write_paddle, write_torch

from ..conftest import DATA, TINY

HF = DATA.parent / "hf_dit"

LABEL_TABLE = "y_embedder.embedding_table.weight"


def output(model: DiT, arrays: dict[str, np.ndarray]) -> np.ndarray:
    with paddle.no_grad():
        return model(*(paddle.to_tensor(arrays[name]) for name in "xty")).numpy()


def assert_same_weights(model: DiT, expected: DiT) -> None:
    own, theirs = model.state_dict(), expected.state_dict()
    assert set(own) == set(theirs)
    for name, tensor in own.items():
        np.testing.assert_array_equal(tensor.numpy(), theirs[name].numpy(), err_msg=name)


# This suite's own checkpoints


@pytest.fixture
def output_dir(tmp_path) -> Path:
    """An output folder with two checkpoints of a tiny model, the later one without an average."""
    config = DiTConfig(**TINY)
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / checkpoint.TRAINER_STATE).write_text("{}")
        config.save(folder / checkpoint.CONFIG)
        write_paddle(folder / checkpoint.MODEL, DiT(config).state_dict())
    write_paddle(tmp_path / "checkpoint-9" / checkpoint.EMA_MODEL, DiT(config).state_dict())
    return tmp_path


def test_the_weights_of_a_folder_are_found(output_dir):
    nine, ten = output_dir / "checkpoint-9", output_dir / "checkpoint-10"
    for source, use_ema, expected in (
        (output_dir, False, ten / checkpoint.MODEL),
        (nine, True, nine / checkpoint.EMA_MODEL),
        (nine / checkpoint.MODEL, True, nine / checkpoint.MODEL),
    ):
        pretrained = read_pretrained(source, use_ema=use_ema)
        assert pretrained.source == expected and pretrained.config == DiTConfig(**TINY)
        np.testing.assert_array_equal(pretrained.weights[LABEL_TABLE], read_weights(expected)[LABEL_TABLE])
    with pytest.raises(InputError, match=r"ema_state\.pdparams does not exist.*--use_ema False"):
        read_pretrained(output_dir)
    with pytest.raises(InputError, match="nowhere does not exist; give a checkpoint folder"):
        read_pretrained(output_dir / "nowhere")


def test_the_configuration_is_that_of_the_checkpoint(output_dir, tmp_path):
    weights, given = output_dir / "checkpoint-9" / checkpoint.MODEL, tmp_path / "given.json"
    DiTConfig(**TINY | {"num_layers": 2}).save(given)
    with pytest.raises(InputError, match=r"given\.json contradicts .*config\.json.* in 'num_layers'"):
        read_pretrained(weights, given)
    weights.with_name(checkpoint.CONFIG).unlink()
    assert read_pretrained(weights, given).config.num_layers == 2
    with pytest.raises(InputError, match="give its configuration with --config_file"):
        read_pretrained(weights)


def test_weights_of_another_configuration_are_refused(output_dir, tmp_path):
    weights, given = output_dir / "checkpoint-9" / checkpoint.MODEL, tmp_path / "given.json"
    weights.with_name(checkpoint.CONFIG).unlink()
    DiTConfig(**TINY | {"num_layers": 2}).save(given)
    with pytest.raises(InputError, match=r"lacks the weight blocks\.1\."):
        load_dit(weights, given)
    DiTConfig(**TINY | {"num_classes": 10}).save(given)
    with pytest.raises(InputError, match=r"embedding_table\.weight .*has shape \[1001, 16\].*has \[11, 16\]"):
        load_dit(weights, given)


# The official code


@pytest.fixture
def config_file(dit, tmp_path):
    """A configuration that does not say which timestep convention official files have."""
    dataclasses.replace(dit.config, timestep_convention="ppdiffusers").save(tmp_path / "main.json")
    return tmp_path / "main.json"


@pytest.fixture
def mini_config_file(make_mini_dit, tmp_path):
    make_mini_dit("ema").config.save(tmp_path / "mini.json")
    return tmp_path / "mini.json"


def test_an_official_file_gives_the_official_network(config_file, dit, golden):
    model = load_dit(DATA / "official.pt", config_file)
    assert model.config.timestep_convention == "official" and not model.training
    assert_same_weights(model, dit)
    assert np.abs(output(model, golden("forward")) - golden("forward")["out"]).max() <= 1e-4


def test_a_training_checkpoint_gives_its_average_or_its_weights(mini_config_file, golden):
    arrays = golden("forward")
    for use_ema, expected in ((True, "mini_out_ema"), (False, "mini_out_model")):
        model = load_dit(DATA / "training.pt", mini_config_file, use_ema)
        assert np.abs(output(model, arrays) - arrays[expected]).max() <= 2e-5


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_official_weights_are_known_by_what_they_are(suffix, config_file, dit, tmp_path):
    """Under any name, with the prefix of PyTorch's data parallelism, with values of half precision."""
    weights = {f"module.{name}": value.astype("float16") for name, value in read_torch(DATA / "official.pt").items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        write_torch(path, weights, {})
        without_config(path)
    found = load_dit(path, config_file).state_dict()
    for name, tensor in dit.state_dict().items():
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy().astype("float16").astype("float32"))


def without_config(path: Path) -> None:
    """Removes the configuration from a file of `write_torch`, as PyTorch's own files have none."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist() if not name.endswith("config.json")}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)


def test_a_published_model_needs_no_configuration_file(tmp_path):
    """The shape of DiT-S/4 at 512 pixels, but a class table of 3 rows."""
    config = dataclasses.replace(
        DiTConfig.from_name("DiT-S/4", image_size=512, num_classes=2), timestep_convention="official"
    )
    shapes = {name: tensor.shape for name, tensor in DiT(config).state_dict().items()}
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    save_file({n: np.ascontiguousarray(v) for n, v in transpose_linear(weights).items()}, tmp_path / "s.safetensors")
    assert read_pretrained(tmp_path / "s.safetensors").config == config


def test_the_heads_of_an_unpublished_model_are_asked_for():
    with pytest.raises(InputError, match=r"official\.pt is none of the published models.*give .*--config_file"):
        read_pretrained(DATA / "official.pt")
    with pytest.raises(InputError, match=r"training\.pt is none of the published models"):
        read_pretrained(DATA / "training.pt")


def test_an_official_file_of_another_model_is_refused(config_file, tmp_path):
    DiTConfig.from_dict(DiTConfig.from_json(config_file).to_dict() | {"num_layers": 4}).save(tmp_path / "four.json")
    with pytest.raises(InputError, match=r"official\.pt lacks the weight blocks\.3\."):
        load_dit(DATA / "official.pt", tmp_path / "four.json")


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "x_embedder.proj.weight", "pos_embed"])
def test_weights_of_something_else_are_named(name, tmp_path):
    weights = read_torch(DATA / "official.pt")
    del weights[name]
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=f"other.safetensors lacks the weight {name}: it holds no DiT"):
        read_pretrained(tmp_path / "other.safetensors")


# Transformers of diffusers


@pytest.fixture(scope="module")
def hf_weights() -> dict[str, np.ndarray]:
    """A transformer of diffusers whose blocks have timestep and label embeddings of their own."""
    weights = {}
    for part in ("transformer_rest", "transformer_block_1"):
        with np.load(HF / f"{part}.npz") as file:
            weights |= file
    return weights


@pytest.fixture
def hf_folder(hf_weights, tmp_path):
    """`hf_folder(block)`: its folder with the embeddings of one block in all of them, or as they are."""

    def make(block: int | None) -> Path:
        folder = tmp_path / f"embeddings_{block}"
        folder.mkdir()
        shutil.copyfile(HF / "config.json", folder / "config.json")
        weights = dict(hf_weights)
        if block is not None:
            for name in weights:
                layer, found, rest = name.partition(".norm1.emb.")
                if found:
                    weights[name] = hf_weights[f"transformer_blocks.{block}.norm1.emb.{rest}"]
        save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        return folder

    return make


def test_a_diffusers_transformer_computes_what_diffusers_does(hf_folder):
    """Its second block has other embeddings, so it takes its condition from a network that has those."""
    with np.load(HF / "hf_dit.npz") as file:
        expected = dict(file)
    first, second = load_dit(hf_folder(0)), load_dit(hf_folder(1))
    assert first.config.timestep_convention == "ppdiffusers" and first.config.num_classes == 1000
    np.testing.assert_array_equal(first.pos_embed.numpy(), expected["pos_embed"])
    x, t, y = (paddle.to_tensor(expected[name]) for name in "xty")
    with paddle.no_grad():
        conditions = [model.t_embedder(t) + model.y_embedder(y) for model in (first, second)]
        tokens = [first.x_embedder(x) + first.pos_embed]
        for block, condition in zip(first.blocks, conditions, strict=True):
            tokens.append(block(tokens[-1], condition))
        patches = first.final_layer(tokens[-1], conditions[0])
        out = unpatchify(patches, first.config.patch_size, first.config.out_channels)
    for name, found in {
        "tokens_in": tokens[0],
        "conditioning.0": conditions[0],
        "block.0": tokens[1],
        "block.1": tokens[2],
        "out": out,
    }.items():
        assert np.abs(found.numpy() - expected[name]).max() <= 2e-4, name


def test_embeddings_that_differ_among_blocks_are_refused(hf_folder):
    with pytest.raises(InputError, match=r"transformer_blocks\.1\.norm1\.emb\.\S+ in \S+ is not that of the first"):
        read_pretrained(hf_folder(None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "describes a UNet2DModel; a DiT is a Transformer2DModel or"),
        ({"norm_type": "layer_norm"}, "has norm_type 'layer_norm': of a DiT it is 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "has activation_fn 'geglu'"),
        ({"attention_bias": False}, "has attention_bias False"),
        ({"norm_elementwise_affine": True}, "has norm_elementwise_affine True"),
        ({"out_channels": 7}, "has 7 out_channels"),
        ({"num_layers": None}, "num_layers must be of type int, not None"),
        ({"num_layers": 3}, r"lacks the weight transformer_blocks\.2\."),
        ({"num_layers": 1}, r"has the weight transformer_blocks\.1\.\S+, which a DiT has not"),
    ],
)
def test_a_transformer_that_is_no_dit_is_refused(hf_folder, change, message):
    config = hf_folder(0) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_pretrained(config.parent)


@pytest.mark.parametrize("text", ["{", "[]", "{}", None])
def test_a_transformer_without_its_configuration_is_named(hf_folder, text):
    folder = hf_folder(0)
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        read_pretrained(folder / "diffusion_pytorch_model.safetensors")


def test_a_pipeline_without_weights_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="holds none of diffusion_pytorch_model.safetensors"):
        read_pretrained(tmp_path)


# There and back


@pytest.mark.parametrize(
    ("convention", "options"),
    [
        ("ppdiffusers", {}),
        ("ppdiffusers", {"safe_serialization": True}),
        ("ppdiffusers", {"library": "diffusers"}),
        ("official", {"exact": True}),
    ],
)
def test_a_pipeline_folder_gives_the_network_back(convention, options, make_dit, vae_folder, tmp_path):
    model = make_dit(convention)
    export_pipeline(model, str(vae_folder), tmp_path / "pipeline", None, **options)
    again = load_dit(tmp_path / "pipeline")
    assert again.config == model.config
    assert_same_weights(again, model)
    assert read_pretrained(tmp_path / "pipeline" / "transformer").source.parent.name == "transformer"


@pytest.mark.parametrize("options", [{}, {"safe_serialization": True}, {"library": "diffusers"}])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_official_weights_survive_the_way_through_a_pipeline(suffix, options, make_dit, vae_folder, tmp_path):
    export_pipeline(make_dit(), str(vae_folder), tmp_path / "pipeline", None, **options)
    path = tmp_path / f"again{suffix}"
    save_official(load_dit(tmp_path / "pipeline"), path)
    expected, found = read_torch(DATA / "official.pt"), read_weights(path)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert read_pretrained(path).config.timestep_convention == "official"


@pytest.mark.parametrize("convention", ["official", "ppdiffusers"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_says_which_convention_it_has(suffix, convention, make_dit, tmp_path):
    model = make_dit(convention)
    save_official(model, tmp_path / f"weights{suffix}")
    again = load_dit(tmp_path / f"weights{suffix}")
    assert again.config == model.config
    assert_same_weights(again, model)


def test_a_configuration_in_the_file_is_not_overruled(make_dit, config_file, tmp_path):
    save_official(make_dit("official"), tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"main\.json contradicts .*weights\.pt.* in 'timestep_convention'"):
        read_pretrained(tmp_path / "weights.pt", config_file)


def test_all_labels_may_be_alike(make_mini_dit, vae_folder, tmp_path):
    """A label table that was never trained: nothing tells how many rows are classes."""
    model = make_mini_dit("ema")
    model.y_embedder.embedding_table.weight.set_value(paddle.zeros([11, 16]))
    export_pipeline(model, str(vae_folder), tmp_path / "pipeline", None)
    assert load_dit(tmp_path / "pipeline").config.num_classes == 1000


# Fine-tuning


@pytest.fixture
def trained(make_mini_dit, tmp_path) -> Path:
    save_official(make_mini_dit("ema"), tmp_path / "trained.pt")
    return tmp_path / "trained.pt"


def test_fine_tuning_starts_from_the_weights(trained, make_mini_dit):
    model, notes = fine_tune(make_mini_dit("ema").config, trained)
    assert model.training and notes == []
    assert_same_weights(model, make_mini_dit("ema"))


def test_another_number_of_classes_makes_the_label_table_anew(trained, make_mini_dit):
    before = make_mini_dit("ema").y_embedder.embedding_table.weight.numpy()
    config = dataclasses.replace(make_mini_dit("ema").config, num_classes=500)
    model, (note,) = fine_tune(config, trained)
    table = model.y_embedder.embedding_table.weight.numpy()
    np.testing.assert_array_equal(table[-1], before[-1])
    assert table.shape == (501, 16)
    assert abs(table[:-1].std() - 0.02) < 0.001 and abs(table[:-1].mean()) < 0.001
    assert "made anew for 500 classes in place of 10" in note


def test_another_resolution_computes_the_positions_anew(trained, make_mini_dit):
    config = dataclasses.replace(make_mini_dit("ema").config, sample_size=16)
    model, (note,) = fine_tune(config, trained)
    np.testing.assert_array_equal(model.pos_embed.numpy(), sincos_positions(16, 8))
    assert "latents of 16 x 16 in place of 8 x 8" in note
    assert model(paddle.zeros([1, 4, 16, 16]), paddle.to_tensor([3]), paddle.to_tensor([0])).shape == [1, 8, 16, 16]


def test_the_timestep_convention_stays_that_of_the_weights(trained, make_mini_dit):
    config = dataclasses.replace(make_mini_dit("ema").config, timestep_convention="ppdiffusers")
    model, (note,) = fine_tune(config, trained)
    assert model.config.timestep_convention == "official"
    assert note.endswith("the model takes timestep_convention official")


@pytest.mark.parametrize(
    ("key", "value"),
    [("patch_size", 4), ("num_layers", 3), ("num_attention_heads", 1), ("mlp_ratio", 2.0), ("learn_sigma", False)],
)
def test_another_network_is_refused(trained, key, value):
    pretrained = read_pretrained(trained)
    config = dataclasses.replace(pretrained.config, **{key: value})
    with pytest.raises(InputError, match=rf"trained\.pt has {key} .*, the model to be trained {value}"):
        start_from(config, pretrained)
