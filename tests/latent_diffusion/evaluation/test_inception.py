import math
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.inception import (
    PUBLISHED_FILE,
    ConvUnit,
    Inception,
    InceptionNetwork,
    load_inception,
    load_network,
    resized,
)
from latent_diffusion.weights import transpose_linear, write_safetensors, write_torch
from tests.peer import needs_peer, run_peer

REPOSITORY = Path(__file__).parents[3]
PEER_SCRIPT = REPOSITORY / "benchmarks" / "peers" / "inception_torch.py"
REFERENCE = REPOSITORY / "tests" / "data" / "inception" / "layers.npz"

# Of float32 against float64, relative to the largest value of a layer.
TOLERANCE = 2e-5

# Trainable ones of torchvision's Inception v3 without the second classifier, and 8 more classes.
PARAMETERS = 23_834_568 + 8 * 2049


def hashed(count: int, seed: int) -> np.ndarray:
    """Numbers between -1 and 1 from integer arithmetic, the same everywhere."""
    k = np.arange(count, dtype=np.uint32)
    return (k * (k * np.uint32(2654435761) + np.uint32(40503 * seed + 1))) / 2.0**31 - 1


def formula_weight(name: str, shape: list[int], seed: int) -> np.ndarray:
    """Values with which activations stay of the order of 1."""
    values = hashed(math.prod(shape), seed).reshape(shape)
    if name.endswith("running_var"):
        values = 1 + values / 2
    elif name.endswith("bn.weight"):
        values = 1 + values / 4
    elif len(shape) > 1:
        values *= math.sqrt(6 / math.prod(shape[1:]))
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def weights():
    """Of the whole network from a formula, in PyTorch's layout."""
    empty = transpose_linear({name: np.empty(t.shape) for name, t in InceptionNetwork().state_dict().items()})
    return {name: formula_weight(name, value.shape, i) for i, (name, value) in enumerate(sorted(empty.items()))}


@pytest.fixture(scope="module")
def weight_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / PUBLISHED_FILE
    write_torch(path, weights, {})
    return path


@pytest.fixture(scope="module")
def network(weight_file):
    return load_network(weight_file).eval()


@pytest.fixture(scope="module")
def extractor(weight_file):
    return load_inception(weight_file)


@pytest.fixture(scope="module")
def images():
    return ((hashed(2 * 40 * 52 * 3, seed=0) + 1) * 128).astype(np.uint8).reshape(2, 40, 52, 3)


@pytest.fixture(scope="module")
def layers(network, images):
    """By name, what goes into each unit and comes out of each unit and block, and the outputs."""
    x = resized(images)
    seen = {"resized": x.numpy()}

    def note(layer, inputs, output, name):
        if isinstance(layer, ConvUnit):
            seen[f"{name} in"] = inputs[0].numpy()
        seen[name] = output.numpy()

    hooks = [
        layer.register_forward_post_hook(lambda *call, name=name: note(*call, name))
        for name, layer in network.named_sublayers()
        if isinstance(layer, ConvUnit) or name.startswith("Mixed") and "." not in name
    ]
    with paddle.no_grad():
        outputs = network(x)
    for hook in hooks:
        hook.remove()
    return seen | {name: x.numpy() for name, x in zip(Inception.widths, outputs, strict=True)}


def summary(values: np.ndarray) -> list[float]:
    values = values.astype(np.float64)
    entries = values.flat[np.linspace(0, values.size - 1, 9).astype(int)]
    return [np.abs(values).mean(), values.mean(), *entries]


def test_every_layer_gives_the_stored_values(layers):
    with np.load(REFERENCE) as file:
        expected = dict(zip(file["names"], file["values"], strict=True))
    assert sorted(layers) == sorted(expected)
    for name, values in layers.items():
        assert np.abs(summary(values) - expected[name]).max() < TOLERANCE * np.abs(expected[name]).max(), name


@needs_peer
def test_every_layer_gives_what_pytorch_computes(layers, weights, images, tmp_path):
    np.savez(tmp_path / "weights.npz", **weights)
    np.save(tmp_path / "images.npy", images)
    run_peer(tmp_path, str(PEER_SCRIPT), "layers", "weights.npz", "images.npy", "peer.npz")
    with np.load(REFERENCE) as stored, np.load(tmp_path / "peer.npz") as peer:
        assert sorted(layers) == sorted(peer.files)
        for name in peer.files:
            expected = peer[name]
            assert layers[name].shape == expected.shape, name
            assert np.abs(layers[name] - expected).max() < TOLERANCE * np.abs(expected).max(), name
            np.testing.assert_allclose(stored["values"][stored["names"] == name][0], summary(expected), rtol=1e-9)


def tensorflow_1_bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W] to [size, size], pixel by pixel: `resize_bilinear` of TensorFlow 1 with its defaults.

    From its kernel (resize_bilinear_op.cc, `LegacyScaler`), since neither PyTorch nor Pillow resizes like that.
    """
    height, width = image.shape
    result = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            result[i, j] = upper + (lower - upper) * (y - top)
    return result


@pytest.mark.parametrize("shape", [(2, 3), (5, 1), (450, 310)])
def test_images_are_resized_as_tensorflow_1_does(shape):
    images = ((hashed(math.prod(shape) * 3, seed=5) + 1) * 128).astype(np.uint8).reshape(1, *shape, 3)
    found = resized(images).numpy()
    assert found.shape == (1, 3, 299, 299) and found.dtype == np.float32
    assert np.abs(found[0, 1] - tensorflow_1_bilinear(images[0, :, :, 1].astype(float), 299)).max() < 1e-2


def test_images_of_its_own_size_stay_as_they_are():
    images = ((hashed(299 * 299 * 3, seed=6) + 1) * 128).astype(np.uint8).reshape(1, 299, 299, 3)
    np.testing.assert_array_equal(resized(images).numpy(), images.transpose(0, 3, 1, 2))


def test_the_extractor_gives_what_the_network_does(extractor, layers, images):
    found = extractor(images)
    assert extractor.widths == {"features": 2048, "spatial": 2023, "logits": 1008}
    assert list(found) == list(extractor.widths)
    for name, values in found.items():
        assert values.dtype == np.float32 and values.shape == (2, extractor.widths[name])
        assert np.abs(values - layers[name]).max() < TOLERANCE * np.abs(layers[name]).max(), name


def test_images_have_the_same_features_in_any_batch(extractor, images):
    both, alone = extractor(images), extractor(images[1:])
    for name, values in alone.items():
        assert np.abs(values[0] - both[name][1]).max() < TOLERANCE * np.abs(values).max(), name


def test_the_network_has_as_many_parameters_as_the_published_one(network):
    assert sum(p.size for p in network.parameters()) == PARAMETERS


def test_a_safetensors_file_gives_the_same_network(network, extractor, weights, tmp_path):
    unused = {"AuxLogits.fc.bias": np.ones(3), "Mixed_5b.branch1x1.bn.num_batches_tracked": np.array(7)}
    write_safetensors(tmp_path / "inception.safetensors", weights | unused)
    found = load_network(tmp_path / "inception.safetensors").state_dict()
    for name, tensor in network.state_dict().items():
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy())


def test_the_identity_tells_weights_apart(extractor, network, monkeypatch):
    monkeypatch.setattr("latent_diffusion.evaluation.inception.compiled", lambda layer, shape: None)
    assert Inception(network).identity == extractor.identity
    changed = InceptionNetwork()
    changed.set_state_dict(network.state_dict())
    with paddle.no_grad():
        changed.fc.bias[3] += 1
    assert extractor.identity.startswith("inception-")
    assert Inception(changed).identity != extractor.identity


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc.weight", None, r"bad\.safetensors lacks the weight fc\.weight"),
        (
            "fc.weight",
            np.zeros([1000, 2048]),
            r"fc\.weight in .*bad\.safetensors has shape \[2048, 1000\], the model's",
        ),
        ("fc2.weight", np.zeros([1, 1]), r"bad\.safetensors has the weight fc2\.weight, which the model has not"),
    ],
    ids=["missing", "another shape", "unknown"],
)
def test_weights_of_another_network_are_named(weights, tmp_path, name, value, message):
    changed = {key: array for key, array in (weights | {name: value}).items() if array is not None}
    write_safetensors(tmp_path / "bad.safetensors", changed)
    with pytest.raises(InputError, match=message):
        load_network(tmp_path / "bad.safetensors")


def test_weights_are_found_in_the_usual_folders(weight_file, network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights-inception-2015-12-05-6726825d.pth").symlink_to(weight_file)
    found = load_network()
    np.testing.assert_array_equal(found.fc.bias.numpy(), network.fc.bias.numpy())


def test_without_weights_it_is_said_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=rf"pretrained_models or models; name them with --weights .* -o .*{PUBLISHED_FILE}"
    ):
        load_network()
