import json

import pytest

from dit.configuration import MODEL_NAMES, DiTConfig
from latent_diffusion.errors import InputError

VALUES = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
}


def test_the_twelve_names_match_the_published_models(golden_json):
    models = golden_json("models")
    assert set(MODEL_NAMES) == {model["name"] for model in models} and len(MODEL_NAMES) == 12
    for model in models:
        config, arguments = DiTConfig.from_name(model["name"], model["image_size"]), model["kwargs"]
        assert config.sample_size == arguments["input_size"]
        assert config.resolution == model["image_size"]
        assert config.hidden_size == arguments["hidden_size"]
        assert config.num_layers == arguments["depth"]
        assert config.num_attention_heads == arguments["num_heads"]
        for key in ("patch_size", "in_channels", "mlp_ratio", "class_dropout_prob", "num_classes", "learn_sigma"):
            assert getattr(config, key) == arguments[key], key


def test_derived_values():
    config = DiTConfig(**VALUES)
    assert config.hidden_size == 64
    assert config.out_channels == 8
    assert DiTConfig(**VALUES, learn_sigma=False).out_channels == 4
    assert config.latent_shape == (4, 8, 8)
    assert config.resolution == 64
    assert config.timestep_convention == "ppdiffusers"


def test_json_round_trip(tmp_path):
    config = DiTConfig(**VALUES, num_classes=7, mlp_ratio=2.5, learn_sigma=False, timestep_convention="official")
    config.save(tmp_path / "config.json")
    assert DiTConfig.from_json(tmp_path / "config.json") == config
    assert DiTConfig.from_dict(config.to_dict()) == config


def test_a_whole_number_is_taken_for_a_ratio():
    config = DiTConfig.from_dict({**VALUES, "mlp_ratio": 4, "class_dropout_prob": 0})
    assert type(config.mlp_ratio) is float and config.mlp_ratio == 4.0
    assert type(config.class_dropout_prob) is float and config.class_dropout_prob == 0.0


def test_an_unknown_key_is_named():
    with pytest.raises(InputError, match="'depth'"):
        DiTConfig.from_dict({**VALUES, "depth": 3})


@pytest.mark.parametrize("key", VALUES)
def test_a_missing_key_is_named(key):
    with pytest.raises(InputError, match=f"'{key}'"):
        DiTConfig.from_dict({k: v for k, v in VALUES.items() if k != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # Wrong types
        ("num_layers", "3"),
        ("num_layers", 3.0),
        ("num_layers", True),
        ("num_layers", None),
        ("mlp_ratio", "4"),
        ("learn_sigma", 1),
        ("timestep_convention", 127),
        # Values that cannot be
        ("sample_size", 0),
        ("num_classes", -1),
        ("patch_size", 3),
        ("attention_head_dim", 0),
        ("mlp_ratio", 0.0),
        ("class_dropout_prob", 1.5),
        ("class_dropout_prob", -0.1),
        ("class_dropout_prob", float("nan")),
        ("timestep_convention", "diffusers"),
    ],
)
def test_a_bad_value_is_named(key, value):
    with pytest.raises(InputError, match=key):
        DiTConfig.from_dict({**VALUES, key: value})


def test_a_width_that_positions_cannot_fill_is_refused():
    with pytest.raises(InputError, match="multiple of 4"):
        DiTConfig.from_dict({**VALUES, "num_attention_heads": 3, "attention_head_dim": 3})


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"DiT-S/2"'])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken\.json"):
        DiTConfig.from_json(path)


def test_a_file_with_a_bad_value_is_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**VALUES, "patch_size": 3}))
    with pytest.raises(InputError, match=r"mine\.json.*patch_size"):
        DiTConfig.from_json(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.json"):
        DiTConfig.from_json(tmp_path / "absent.json")


@pytest.mark.parametrize(("name", "image_size"), [("DiT-M/2", 256), ("DiT-S/2", 100), ("DiT-S/2", 0), ("DiT-S/8", 40)])
def test_a_bad_name_or_image_size_is_refused(name, image_size):
    with pytest.raises(InputError):
        DiTConfig.from_name(name, image_size)
