import json
import math

import pytest

from latent_diffusion.errors import InputError
from uvit_ldm.configuration import UViTConfig

KEYS = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "clip_dim": 32,
    "num_text_tokens": 7,
}
# What the `config.json` of ppdiffusers' class holds besides.
OTHERS = {
    "_class_name": "UViTT2IModel",
    "_ppdiffusers_version": "0.29.0",
    "out_channels": 4,
    "norm_type": "layer_norm",
    "conv": True,
    "qk_scale": None,
    "pos_drop_rate": 0.0,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
}


def test_shapes_follow_from_the_keys():
    config = UViTConfig.from_dict(KEYS)
    assert (config.hidden_size, config.extras, config.side, config.resolution) == (64, 8, 4, 64)
    assert config.latent_shape == (4, 8, 8) and config.context_shape == (7, 32)
    assert config.scaling_factor == 0.2301 and config.mlp_ratio == 4.0 and not config.qkv_bias


def test_it_is_read_as_it_was_written(tmp_path):
    config = UViTConfig.from_dict(KEYS | {"mlp_ratio": 2, "scaling_factor": 0.5})
    config.save(tmp_path / "config.json")
    assert UViTConfig.from_json(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text())["mlp_ratio"] == 2.0


def test_the_keys_of_ppdiffusers_are_accepted_at_their_only_value():
    assert UViTConfig.from_dict(KEYS | OTHERS) == UViTConfig.from_dict(KEYS)
    assert UViTConfig.from_dict(KEYS | {"out_channels": None}) == UViTConfig.from_dict(KEYS)


def test_the_scaling_factor_travels_under_a_name_that_the_libraries_pass_over():
    assert UViTConfig.from_dict(KEYS | {"_scaling_factor": 0.99}).scaling_factor == 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "rms_norm"}, "model has norm_type 'rms_norm'; only 'layer_norm' is supported"),
        ({"conv": False}, "model has conv False; only True is supported"),
        ({"qk_scale": 0.5}, "model has qk_scale 0.5; only None is supported"),
        ({"drop_rate": 0.1}, "model has drop_rate 0.1; only 0.0 is supported"),
        ({"pos_drop_rate": 0.1}, "model has pos_drop_rate 0.1"),
        ({"attn_drop_rate": 0.1}, "model has attn_drop_rate 0.1"),
        ({"out_channels": 8}, "model has out_channels 8; only 4 is supported"),
        ({"_scaling_factor": "big"}, "model: the configuration key scaling_factor must be of type float, not 'big'"),
        ({"scaling_factor": 0.0}, "model: mlp_ratio and scaling_factor must be positive"),
        ({"mlp_ratio": math.inf}, "model: the configuration key mlp_ratio must be finite, not inf"),
        ({"num_layers": 1}, "model: num_layers must be at least 2, not 1"),
        ({"num_attention_heads": 1, "attention_head_dim": 7}, "the width 7 .* must be even"),
        ({"patch_size": 3}, "sample_size 8 is not a multiple of patch_size 3"),
        ({"clip_dim": 0}, "clip_dim must be at least 1, not 0"),
        ({"num_text_tokens": 7.5}, "num_text_tokens must be of type int, not 7.5"),
        ({"qkv_bias": 1}, "qkv_bias must be of type bool, not 1"),
        ({"num_classes": 10}, "model has the unknown key 'num_classes'; known are sample_size, patch_size"),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        UViTConfig.from_dict(KEYS | changes, "model")


def test_a_missing_key_is_named():
    with pytest.raises(InputError, match="model lacks the key 'patch_size'"):
        UViTConfig.from_dict({key: value for key, value in KEYS.items() if key != "patch_size"}, "model")


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "{"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.json (must be a JSON object|is not JSON)"):
        UViTConfig.from_json(tmp_path / "model.json")
