import json
from pathlib import Path

import numpy as np
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.dinov2 import (
    DINOv2,
    VisionTransformer,
    antialiased_bicubic,
    bicubic,
    load_dinov2,
    prepare,
)
from latent_diffusion.evaluation.extractors import make_extractor
from latent_diffusion.weights import write_safetensors, write_torch
from tests.peer import needs_peer, run_peer

# tests/data/dinov2/peer.npz holds what RUN_PEER computed with transformers 4.48 and torch 2.13.
PEER = Path(__file__).parents[2] / "data" / "dinov2" / "peer.npz"

DIM, DEPTH, HEADS, HIDDEN, REGISTERS = 128, 2, 2, 256, 4
KINDS = ("plain", "gated", "registers")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def shapes(kind, tokens=257):
    """The names and shapes of the official code, in PyTorch's layout."""
    layers = {"attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM)}
    layers |= (
        {"mlp.w12": (2 * HIDDEN, DIM), "mlp.w3": (DIM, HIDDEN)}
        if kind == "gated"
        else {"mlp.fc1": (HIDDEN, DIM), "mlp.fc2": (DIM, HIDDEN)}
    )
    block = {f"{name}.weight": shape for name, shape in layers.items()}
    block |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    block |= {f"norm{i}.{part}": (DIM,) for i in (1, 2) for part in ("weight", "bias")}
    block |= {f"ls{i}.gamma": (DIM,) for i in (1, 2)}
    found = {"cls_token": (1, 1, DIM), "pos_embed": (1, tokens, DIM), "mask_token": (1, DIM)}
    found |= {"register_tokens": (1, REGISTERS, DIM)} if kind == "registers" else {}
    found |= {"patch_embed.proj.weight": (DIM, 3, 14, 14), "patch_embed.proj.bias": (DIM,)}
    found |= {f"blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in block.items()}
    return found | {"norm.weight": (DIM,), "norm.bias": (DIM,)}


def official_weights(kind, tokens=257):
    rng = np.random.default_rng(0)
    # Deviations that keep every part of the network visible in the features.
    scales = {".gamma": 1, "norm": 1, ".bias": 0.3, "token": 1, "pos_embed": 1, "patch": 0.05}
    return {
        name: next((s for part, s in scales.items() if part in name), 0.08) * rng.standard_normal(shape, np.float32)
        for name, shape in shapes(kind, tokens).items()
    }


# Names of the official code and what transformers has for them.
THEIR_NAMES = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "pos_embed": "embeddings.position_embeddings",
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "blocks.": "encoder.layer.",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}


def in_transformers(weights):
    renamed = {}
    for name, value in weights.items():
        for official, theirs in THEIR_NAMES.items():
            name = name.replace(official, theirs)
        name = name.replace("norm.", "layernorm.") if name.startswith("norm.") else name
        if "attn.qkv" in name:
            for part, values in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = values
        else:
            renamed[name] = value
    return renamed


@pytest.fixture(scope="module")
def peer():
    with np.load(PEER) as file:
        return dict(file)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, [2, 40, 56, 3], np.uint8)


@pytest.fixture(scope="module")
def extractors(tmp_path_factory):
    """An extractor of each kind, from a file of the official code."""
    found = {}
    for kind in KINDS:
        path = tmp_path_factory.mktemp("dinov2") / f"{kind}.pth"
        write_torch(path, official_weights(kind), {})
        found[kind] = load_dinov2(path)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_class_tokens_of_transformers(extractors, images, peer, kind):
    extractor = extractors[kind]
    features = extractor(images)
    assert list(features) == ["features"] and extractor.widths == {"features": DIM}
    assert features["features"].dtype == np.float32 and features["features"].shape == (2, DIM)
    np.testing.assert_allclose(features["features"], peer[kind], atol=1e-5 * np.abs(peer[kind]).max())


def test_features_of_an_image_do_not_depend_on_the_others(extractors, images):
    together = extractors["plain"](images)["features"]
    for i in range(2):
        alone = extractors["plain"](images[i : i + 1])["features"]
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_transformers_gives_the_same(extractors, tmp_path, file, kind):
    write = write_torch if file.endswith(".bin") else write_safetensors
    write(tmp_path / file, in_transformers(official_weights(kind)), {})
    for path in (tmp_path, tmp_path / file):
        assert load_dinov2(path).identity == extractors[kind].identity


def test_images_are_resized_as_torch_does_with_antialiasing(peer):
    for number in range(3):
        pixels, expected = peer[f"pixels{number}"], peer[f"resized{number}"]
        new_height, new_width = expected.shape
        rows, columns = antialiased_bicubic(len(pixels), new_height), antialiased_bicubic(pixels.shape[1], new_width)
        np.testing.assert_allclose(rows @ pixels @ columns.T, expected, atol=1e-9 * 255)


def test_pixels_are_normalized_and_not_clipped():
    image = np.zeros([1, 30, 500, 3], np.uint8)
    image[:, 10:20, 100:400] = [255, 128, 255]
    pixels = antialiased_bicubic(30, 224) @ (image[0, :, :, 0] / 255) @ antialiased_bicubic(500, 224).T
    assert pixels.max() > 1.05 and pixels.min() < -0.05
    found = prepare(image).numpy()
    assert found.shape == (1, 3, 224, 224)
    for channel, share in enumerate((1, 128 / 255, 1)):
        expected = (pixels * share - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(found[0, channel], expected, atol=1e-5)


def test_an_image_of_224_pixels_keeps_its_values():
    np.testing.assert_allclose(antialiased_bicubic(224, 224), np.eye(224), atol=1e-12)


def test_positions_are_interpolated_as_torch_does(peer):
    matrix = bicubic(37, 16, 16.1 / 37)
    np.testing.assert_allclose(matrix @ peer["positions"] @ matrix.T, peer["interpolated"], atol=1e-9)
    antialiased = antialiased_bicubic(37, 16)
    np.testing.assert_allclose(antialiased @ peer["positions"] @ antialiased.T, peer["antialiased"], atol=1e-9)


@pytest.mark.parametrize(("kind", "resized"), [("plain", "interpolated"), ("registers", "antialiased")])
def test_positions_of_a_larger_grid_are_interpolated_as_the_official_model_of_the_kind_does(
    peer, images, tmp_path, kind, resized
):
    weights = official_weights(kind, tokens=1 + 37**2)
    weights["pos_embed"][0, 1:] = peer["positions"].reshape(-1, 1) * np.linspace(-1, 1, DIM)
    write_torch(tmp_path / "larger.pth", weights, {})
    grid = peer[resized].reshape(-1, 1) * np.linspace(-1, 1, DIM)
    fitted = np.concatenate([weights["pos_embed"][:, :1], grid[None].astype(np.float32)], axis=1)
    write_torch(tmp_path / "fitted.pth", weights | {"pos_embed": fitted}, {})
    larger, expected = (load_dinov2(tmp_path / name)(images)["features"] for name in ("larger.pth", "fitted.pth"))
    np.testing.assert_allclose(larger, expected, atol=1e-5 * np.abs(expected).max())


def test_the_identity_names_the_model_and_its_weights(extractors, tmp_path):
    official = DINOv2(VisionTransformer(dim=384, depth=0, hidden_dim=0, registers=4))
    assert official.identity.startswith("dinov2_vits14_reg4-")
    weights = official_weights("plain")
    weights["norm.bias"] = weights["norm.bias"] + 1
    write_torch(tmp_path / "other.pth", weights, {})
    other = load_dinov2(tmp_path / "other.pth")
    assert other.name == extractors["plain"].name == "dinov2"
    assert other.identity != extractors["plain"].identity
    assert all(found.identity.startswith("dinov2_vit12814-") for found in (other, extractors["plain"]))


HOW_TO_GET = (
    r"name them with --weights \(in training --eval_weights\), or get them with: curl -L --create-dirs -o "
    r"pretrained_models/dinov2_vitl14_pretrain\.pth https://dl\.fbaipublicfiles\.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain\.pth$"
)


def test_without_weights_the_usual_file_and_how_to_get_it_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = r"usually dinov2_vitl14_pretrain\.pth, in pretrained_models or models"
    with pytest.raises(InputError, match=f"found no weights of DINOv2, {usual}; {HOW_TO_GET}"):
        load_dinov2()
    with pytest.raises(InputError, match=r"my\.pth"):
        load_dinov2(Path("my.pth"))


@pytest.mark.parametrize("folder", ["pretrained_models", "models"])
def test_the_usual_file_is_found(extractors, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    write_torch(tmp_path / folder / "dinov2_vitl14_pretrain.pth", official_weights("plain"), {})
    assert make_extractor("dinov2").identity == extractors["plain"].identity


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(InputError, match=r"the DINOv2 folder .* holds no model\.safetensors or pytorch_model\.bin"):
        load_dinov2(tmp_path)


def without(*names):
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("cls_token"), r"holds no weights of DINOv2: it lacks cls_token"),
        (without("blocks.0.mlp.fc2.weight"), r"holds no weights of DINOv2: it lacks blocks\.0\.mlp\.fc2\.weight"),
        (without("blocks.1.ls1.gamma"), r"lacks the weight blocks\.1\.ls1\.gamma"),
        (lambda w: w | {"head.weight": w["norm.weight"]}, r"has the weight head\.weight"),
        (lambda w: w | {"pos_embed": w["pos_embed"][:, :-1]}, r"its pos_embed has shape \[1, 256, 128\]"),
        (lambda w: w | {"pos_embed": w["norm.bias"]}, r"its pos_embed has shape \[128\]"),
        (lambda w: w | {"pos_embed": w["pos_embed"][..., 1:]}, r"pos_embed in .* has shape \[1, 257, 127\]"),
        (lambda w: w | {"cls_token": w["cls_token"][..., :100]}, r"its width 100 is no multiple of 64"),
    ],
)
def test_other_weights_are_named(tmp_path, change, message):
    write_torch(tmp_path / "some.pth", change(official_weights("plain")), {})
    with pytest.raises(InputError, match=message) as error:
        load_dinov2(tmp_path / "some.pth")
    assert str(tmp_path / "some.pth") in str(error.value)


def test_a_folder_of_transformers_that_lacks_keys_is_named(tmp_path):
    missing = "encoder.layer.0.attention.attention.key.weight"
    weights = without(missing)(in_transformers(official_weights("plain")))
    write_safetensors(tmp_path / "model.safetensors", weights)
    with pytest.raises(InputError, match=r"model\.safetensors lacks the weight blocks\.0\.attn\.qkv\.weight"):
        load_dinov2(tmp_path)


# What transformers' models and torch's interpolation make of the same numbers.
RUN_PEER = """
import json, sys
import numpy as np, torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

settings, mean, std = json.loads(sys.argv[1])
torch.manual_seed(0)
found = {}

def resize(x, **how):
    return F.interpolate(torch.as_tensor(x, dtype=torch.float64)[None, None], mode="bicubic", **how)[0, 0].numpy()

for number, (old, new) in enumerate([((12, 21), (40, 16)), ((30, 17), (7, 17)), ((11, 64), (11, 5))]):
    pixels = np.random.default_rng(number).integers(0, 256, old).astype(float)
    found |= {f"pixels{number}": pixels, f"resized{number}": resize(pixels, size=new, antialias=True)}
positions = np.random.default_rng(3).standard_normal((37, 37))
found |= {
    "positions": positions,
    "interpolated": resize(positions, scale_factor=(16.1 / 37, 16.1 / 37)),
    "antialiased": resize(positions, size=(16, 16), antialias=True),
}
images = torch.as_tensor(np.load("images.npy")).permute(0, 3, 1, 2)
pixels = F.interpolate(images.double(), size=(224, 224), mode="bicubic", antialias=True).float() / 255
pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
for kind in ("plain", "gated", "registers"):
    if kind == "registers":
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings))
    else:
        # Two thirds of the ratio make a gated MLP's width.
        gated = {"use_swiglu_ffn": True, "mlp_ratio": 3} if kind == "gated" else {}
        model = Dinov2Model(Dinov2Config(**settings | gated))
    model.load_state_dict(load_file(f"{kind}.safetensors"))
    with torch.no_grad():
        found[kind] = model.eval()(pixels).last_hidden_state[:, 0].numpy()
np.savez("peer.npz", **found)
"""


@needs_peer
def test_the_reference_is_what_transformers_and_torch_compute(images, peer, tmp_path):
    for kind in KINDS:
        write_safetensors(tmp_path / f"{kind}.safetensors", in_transformers(official_weights(kind)))
    np.save(tmp_path / "images.npy", images)
    settings = {
        "hidden_size": DIM,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "mlp_ratio": HIDDEN // DIM,
        "image_size": 224,
        "patch_size": 14,
    }
    run_peer(tmp_path, "-c", RUN_PEER, json.dumps([settings, MEAN.tolist(), STD.tolist()]))
    with np.load(tmp_path / "peer.npz") as file:
        assert set(file) == set(peer)
        for name, expected in peer.items():
            np.testing.assert_allclose(file[name], expected, atol=1e-5, err_msg=name)
