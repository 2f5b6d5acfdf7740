from pathlib import Path

import numpy as np
import pytest

from dit.official import infer_config, save_official
from latent_diffusion.errors import InputError
from latent_diffusion.weights import read_config, read_torch, read_weights

from ..conftest import DATA


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_was_read_is_written_again(suffix, dit, tmp_path):
    path = tmp_path / f"again{suffix}"
    save_official(dit, path)
    expected, found = read_torch(DATA / "official.pt"), read_weights(path)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert read_config(path) == dit.config.to_dict()


@pytest.mark.parametrize("name", ["weights.pdparams", "weights", "nowhere/weights.pt"])
def test_an_output_that_cannot_be_is_named(name, dit, tmp_path):
    with pytest.raises(InputError, match="nowhere of the output does not exist|must end in .pt or .safetensors"):
        save_official(dit, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def shapes(depth: int, width: int) -> dict[str, np.ndarray]:
    """Official weights, of no size in memory: patches of 2, 4 channels, 1000 classes, 32 x 32 latents."""
    found = {
        "pos_embed": (1, 256, width),
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "y_embedder.embedding_table.weight": (1001, width),
        "blocks.0.mlp.fc1.weight": (4 * width, width),
        "final_layer.linear.weight": (32, width),
    }
    found |= {f"blocks.{i}.attn.qkv.weight": (3 * width, width) for i in range(depth)}
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in found.items()}


@pytest.mark.parametrize(("depth", "width", "heads"), [(12, 384, 6), (12, 768, 12), (24, 1024, 16), (28, 1152, 16)])
def test_the_heads_are_those_of_the_published_model(depth, width, heads):
    config = infer_config(shapes(depth, width), Path("weights.pt"))
    assert (config.num_attention_heads, config.attention_head_dim) == (heads, width // heads)
    assert (config.num_layers, config.patch_size, config.sample_size, config.num_classes) == (depth, 2, 32, 1000)
    assert config.mlp_ratio == 4.0 and config.learn_sigma and config.timestep_convention == "official"


def test_a_model_without_variance_is_known():
    weights = shapes(12, 384) | {"final_layer.linear.weight": np.zeros((16, 384), np.float32)}
    assert not infer_config(weights, Path("weights.pt")).learn_sigma


def test_weights_of_other_shapes_are_refused():
    weights = shapes(12, 384) | {"x_embedder.proj.weight": np.zeros((384, 16), np.float32)}
    with pytest.raises(InputError, match="weights.pt holds no DiT: its weights have other shapes"):
        infer_config(weights, Path("weights.pt"))
