import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

from dit import extraction
from dit.configuration import DiTConfig
from dit.extraction import ExtractionSettings, extract_features
from dit.features import FastDiTFeatures
from latent_diffusion.errors import InputError
from latent_diffusion.images import read_image
from latent_diffusion.vae import encode_moments, load_vae, sample_moments


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.png", "cat/3.png", "dog/1.png", "dog/2.png"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 64, 3), dtype=np.uint8)).save(root / name)
    return root


@pytest.fixture(scope="module")
def vae(vae_folder):
    return load_vae(str(vae_folder))


@pytest.fixture
def extract(images, vae):
    """`extract(folder, **changes)` -> how many images were encoded."""

    def run(folder: Path, data: Path = images, dtype="float32", flip=False, seed=0, batch_size=2) -> int:
        encoded, _ = extract_features(data, folder, ExtractionSettings("tiny", 64, dtype, flip, seed), vae, batch_size)
        return encoded

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_layout(extract, tmp_path, dtype):
    assert extract(tmp_path, dtype=dtype) == 5
    expected = {f"imagenet64_{kind}/{i}.npy" for kind in ("features", "labels") for i in range(5)}
    assert content(tmp_path).keys() == expected | {"imagenet64_manifest.json"}
    for i, label in enumerate([0, 0, 0, 1, 1]):
        latents = np.load(tmp_path / f"imagenet64_features/{i}.npy")
        assert latents.shape == (1, 4, 8, 8) and latents.dtype == dtype
        found = np.load(tmp_path / f"imagenet64_labels/{i}.npy")
        assert found.shape == (1,) and found.dtype == np.int64 and found[0] == label
    manifest = json.loads((tmp_path / "imagenet64_manifest.json").read_text())
    assert manifest["classes"] == ["cat", "dog"] and manifest["dtype"] == dtype


def test_latents_are_scaled_samples_of_the_posterior(extract, tmp_path, images, vae):
    extract(tmp_path, seed=3)
    moments = encode_moments(vae, read_image(images / "cat/2.png", 64)[None])[0]
    noise = np.random.default_rng([3, 1]).standard_normal((4, 8, 8), dtype=np.float32)
    found = np.load(tmp_path / "imagenet64_features/1.npy")
    np.testing.assert_allclose(found, sample_moments(moments, noise)[None] * vae.config.scaling_factor, atol=1e-5)


def test_training_reads_what_was_written(extract, tmp_path):
    extract(tmp_path, flip=True)
    config = DiTConfig(8, 2, 4, 1, 2, 8, num_classes=2)
    assert len(FastDiTFeatures(tmp_path, config, use_flip=True)) == 5


def test_extraction_is_deterministic_and_the_seed_matters(extract, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        paddle.seed(seed + 100)
        extract(tmp_path / name, seed=seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")


@pytest.mark.parametrize("saves", [1, 2, 3, 6, 9])
def test_an_interrupted_extraction_continues_to_the_same_files(extract, tmp_path, monkeypatch, saves):
    """Interrupted between any two files: between latents, latents and labels, or batches."""
    extract(tmp_path / "whole", flip=True)
    save, count = extraction._save, 0

    def interrupt(path, array):
        nonlocal count
        count += 1
        if count > saves:
            raise KeyboardInterrupt
        save(path, array)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extraction, "_save", interrupt)
        extract(tmp_path / "interrupted", flip=True)
    encoded = extract(tmp_path / "interrupted", flip=True)
    assert encoded == (5 if saves < 6 else 3)
    assert content(tmp_path / "interrupted") == content(tmp_path / "whole")
    assert extract(tmp_path / "interrupted", flip=True) == 0


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"flip": True}, {"seed": 1}])
def test_other_settings_on_the_same_folder_are_refused(extract, tmp_path, change):
    extract(tmp_path)
    before = content(tmp_path)
    with pytest.raises(InputError, match=f"imagenet64_manifest.json says .* made with {next(iter(change))}"):
        extract(tmp_path, **change)
    assert content(tmp_path) == before


def test_other_images_on_the_same_folder_are_refused(extract, tmp_path, images):
    extract(tmp_path / "features")
    more = shutil.copytree(images, tmp_path / "more")
    shutil.copy(more / "cat/1.png", more / "dog/9.png")
    with pytest.raises(InputError, match="made with images 5, not 6"):
        extract(tmp_path / "features", data=more)


def test_a_damaged_manifest_is_named(extract, tmp_path):
    (tmp_path / "imagenet64_manifest.json").write_text("{")
    with pytest.raises(InputError, match="imagenet64_manifest.json is damaged"):
        extract(tmp_path)


def test_mirrored_latents_are_those_of_mirrored_images(extract, tmp_path, images):
    mirrored = shutil.copytree(images, tmp_path / "mirrored")
    for path in mirrored.rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    extract(tmp_path / "both", flip=True)
    extract(tmp_path / "other", data=mirrored)
    for i in range(5):
        found = np.load(tmp_path / f"both/imagenet64_features_flip/{i}.npy")
        np.testing.assert_allclose(found, np.load(tmp_path / f"other/imagenet64_features/{i}.npy"), atol=1e-5)


def test_an_unreadable_image_is_named_and_the_rest_is_kept(extract, tmp_path, images):
    spoiled = shutil.copytree(images, tmp_path / "spoiled")
    good = (spoiled / "dog/1.png").read_bytes()
    (spoiled / "dog/1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"dog/1\.png"):
        extract(tmp_path / "features", data=spoiled)
    (spoiled / "dog/1.png").write_bytes(good)
    assert extract(tmp_path / "features", data=spoiled) == 3
