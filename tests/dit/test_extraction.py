import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

from dit import feature_files
from dit.configuration import DiTConfig
from dit.extraction import ExtractionSettings, extract_features
from dit.feature_files import FeatureFilesWriter
from dit.features import open_features
from latent_diffusion import extraction, packed
from latent_diffusion.errors import InputError
from latent_diffusion.images import read_image
from latent_diffusion.packed import PackedWriter, is_packed
from latent_diffusion.vae import encode_moments, load_vae, sample_moments
from tests.interruptions import interrupt_after

CONFIG = DiTConfig(8, 2, 4, 1, 2, 8, num_classes=2)
WRITES = {"files": "write_file", "packed": "write_rows"}
TINY_VAE = Path(__file__).parents[1] / "data" / "vae" / "vae_tiny"


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

    def run(folder: Path, data: Path = images, batch_size=2, skip_unreadable=False, **changes) -> int:
        settings = ExtractionSettings("tiny", 64, **changes)
        return extract_features(data, folder, settings, vae, batch_size, 2, skip_unreadable).encoded

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
    assert len(open_features(tmp_path, CONFIG, use_flip=True)) == 5


def test_extraction_is_deterministic_and_the_seed_matters(extract, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        paddle.seed(seed + 100)
        extract(tmp_path / name, seed=seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")


@pytest.mark.parametrize(
    ("layout", "module", "function", "calls"),
    [("files", feature_files, "write_file", calls) for calls in (1, 2, 3, 6, 9)]
    + [("files", Path, "replace", 4)]
    + [("packed", packed, "allocate", calls) for calls in (0, 1, 2)]
    + [("packed", packed, "write_rows", calls) for calls in (0, 1, 2, 5)]
    + [("packed", packed, "file_sha256", 1), ("packed", extraction, "publish_folder", 0)],
)
def test_an_interrupted_extraction_continues_to_the_same_files(
    extract, tmp_path, monkeypatch, layout, module, function, calls
):
    """Interrupted between any two files: between latents, latents and labels, batches, or at the end."""
    monkeypatch.setattr(packed, "RECORDS_PER_SHARD", 3)
    settings = {"layout": layout, "flip": layout == "files"}
    extract(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, module, function, calls)
        extract(tmp_path / "interrupted", **settings)
    assert layout == "files" or not (tmp_path / "interrupted").exists()
    extract(tmp_path / "interrupted", **settings)
    assert content(tmp_path / "interrupted") == content(tmp_path / "whole")
    assert extract(tmp_path / "interrupted", **settings) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interrupted", "whole"]


@pytest.mark.parametrize("length", [0, 200])
@pytest.mark.parametrize("kind", ["features", "labels"])
def test_a_file_that_lost_its_end_is_written_again(extract, tmp_path, kind, length):
    """As a power failure may leave it."""
    extract(tmp_path)
    before = content(tmp_path)
    spoiled = tmp_path / f"imagenet64_{kind}/3.npy"
    spoiled.write_bytes(spoiled.read_bytes()[: min(length, 130)])
    assert extract(tmp_path) == 1
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "name"), [({"dtype": "float16"}, "dtype"), ({"flip": True}, "record_shape"), ({"seed": 1}, "seed")]
)
def test_other_settings_on_the_same_folder_are_refused(extract, tmp_path, change, name):
    extract(tmp_path)
    before = content(tmp_path)
    with pytest.raises(InputError, match=f"imagenet64_manifest.json says .* made with {name}"):
        extract(tmp_path, **change)
    assert content(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_on_packed_features_are_refused(extract, tmp_path, monkeypatch, finished):
    with monkeypatch.context() as patch:
        if not finished:
            interrupt_after(patch, packed, "write_rows", 2)
        with contextlib.suppress(KeyboardInterrupt):
            extract(tmp_path / "features", layout="packed")
    before = content(tmp_path)
    with pytest.raises(InputError, match="manifest.json says .* made with dtype 'float16', not 'float32'"):
        extract(tmp_path / "features", layout="packed", dtype="float32")
    assert content(tmp_path) == before


def test_packed_features_do_not_replace_something_else(extract, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="exists and holds no packed features"):
        extract(tmp_path, layout="packed")


def test_other_images_on_the_same_folder_are_refused(extract, tmp_path, images):
    extract(tmp_path / "features")
    more = shutil.copytree(images, tmp_path / "more")
    shutil.copy(more / "cat/1.png", more / "dog/9.png")
    with pytest.raises(InputError, match="made with records 5, not 6"):
        extract(tmp_path / "features", data=more)


@pytest.mark.parametrize("layout", ["files", "packed"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_renamed_image_on_the_same_folder_is_refused(extract, tmp_path, monkeypatch, images, layout, finished):
    """The numbers of images and classes stay, but images would get the features of others."""
    with monkeypatch.context() as patch:
        if not finished:
            interrupt_after(patch, packed if layout == "packed" else feature_files, WRITES[layout], 3)
        with contextlib.suppress(KeyboardInterrupt):
            extract(tmp_path / "features", layout=layout)
    before = content(tmp_path)
    renamed = shutil.copytree(images, tmp_path / "images")
    (renamed / "cat/1.png").rename(renamed / "cat/4.png")
    with pytest.raises(InputError, match="manifest.json says .* made with image_list_sha256 '.*', not '.*'; choose"):
        extract(tmp_path / "features", data=renamed, layout=layout)
    shutil.rmtree(renamed)
    assert content(tmp_path) == before


def test_images_may_move_with_their_folder(extract, tmp_path, images):
    extract(tmp_path / "features")
    assert extract(tmp_path / "features", data=shutil.copytree(images, tmp_path / "images")) == 0


def test_files_do_not_join_packed_features(extract, tmp_path):
    extract(tmp_path / "features", layout="packed")
    before = content(tmp_path)
    with pytest.raises(InputError, match="features holds packed features; choose another --features-path"):
        extract(tmp_path / "features")
    assert content(tmp_path) == before


@pytest.mark.parametrize("layout", ["files", "packed"])
@pytest.mark.parametrize("target", ["file.txt", "file.txt/deep"])
def test_a_folder_that_cannot_be_written_is_named(extract, tmp_path, layout, target):
    (tmp_path / "file.txt").touch()
    with pytest.raises(InputError, match=f"{target}.* choose another"):
        extract(tmp_path / target, layout=layout)
    assert content(tmp_path) == {"file.txt": b""}


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


@pytest.fixture
def spoiled(tmp_path, images) -> Path:
    """The images, of which the fourth is none."""
    folder = shutil.copytree(images, tmp_path / "spoiled")
    (folder / "dog/1.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_an_unreadable_image_is_named_and_the_rest_is_kept(extract, tmp_path, images, spoiled, layout):
    with pytest.raises(InputError, match=r"dog/1\.png"):
        extract(tmp_path / "features", data=spoiled, layout=layout)
    assert not is_packed(tmp_path / "features")
    shutil.copy(images / "dog/1.png", spoiled / "dog/1.png")
    assert extract(tmp_path / "features", data=spoiled, layout=layout) == 3


def test_a_skipped_image_is_named_and_the_files_of_others_do_not_change(extract, tmp_path, spoiled, capsys):
    extract(tmp_path / "all")
    assert extract(tmp_path / "some", data=spoiled, skip_unreadable=True) == 4
    assert f"skipped: cannot read the image {spoiled}/dog/1.png" in capsys.readouterr().err
    missing = {"imagenet64_features/3.npy", "imagenet64_labels/3.npy"}
    left = {name: data for name, data in content(tmp_path / "all").items() if name not in missing}
    found = content(tmp_path / "some")
    manifest = json.loads(found.pop("imagenet64_manifest.json"))
    del left["imagenet64_manifest.json"]
    assert found == left
    assert manifest["skipped"] == ["dog/1.png"] and (manifest["images"], manifest["records"]) == (4, 5)


def test_a_skipped_image_is_no_sample_of_packed_features(extract, tmp_path, spoiled, capsys):
    assert extract(tmp_path / "some", data=spoiled, skip_unreadable=True, layout="packed") == 4
    assert f"skipped: cannot read the image {spoiled}/dog/1.png" in capsys.readouterr().err
    assert np.load(tmp_path / "some/labels.npy").tolist() == [0, 0, 0, -1, 1]
    assert not np.load(tmp_path / "some/shard-00000.npy")[3].any()
    manifest = json.loads((tmp_path / "some/manifest.json").read_text())
    assert manifest["skipped"] == ["dog/1.png"] and (manifest["images"], manifest["records"]) == (4, 5)
    assert len(open_features(tmp_path / "some", CONFIG)) == 4


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_lost_features_are_missed(extract, tmp_path, monkeypatch, layout):
    """An image that could be read and has no features is no skipped one."""
    module, writer = (feature_files, FeatureFilesWriter) if layout == "files" else (packed, PackedWriter)
    write = writer.write
    monkeypatch.setattr(
        getattr(module, writer.__name__), "write", lambda self, n, r, labels: write(self, n[:1], r[:1], labels[:1])
    )
    with pytest.raises(InputError, match=r"cat/2.png can be read but has no features; run the same command again"):
        extract(tmp_path / "features", layout=layout, skip_unreadable=True)


def test_packed_features_are_the_moments_of_images_and_their_mirrors(extract, tmp_path, images, vae):
    assert extract(tmp_path / "packed", layout="packed", batch_size=5) == 5
    pixels = np.stack([read_image(path, 64) for path in sorted(images.rglob("*.png"))])
    moments = np.stack([encode_moments(vae, pixels), encode_moments(vae, pixels[:, :, ::-1])], axis=1)
    found = np.load(tmp_path / "packed/shard-00000.npy")
    assert found.dtype == np.float16 and found.shape == (5, 2, 8, 8, 8)
    np.testing.assert_array_equal(found, moments.astype(np.float16))
    assert np.load(tmp_path / "packed/labels.npy").tolist() == [0, 0, 0, 1, 1]
    manifest = json.loads((tmp_path / "packed/manifest.json").read_text())
    assert manifest["vae"] == "tiny" and manifest["scaling_factor"] == 0.5 and manifest["content"] == "moments"
    assert manifest["classes"] == ["cat", "dog"] and manifest["resolution"] == 64 and manifest["skipped"] == []


@pytest.mark.parametrize("setting", ["batch_size", "num_workers"])
def test_counts_below_one_are_refused(images, vae, tmp_path, setting):
    with pytest.raises(InputError, match=f"{setting.split('_')[-1]}.* must be at least 1, not 0"):
        extract_features(images, tmp_path, ExtractionSettings("tiny", 64), vae, **{setting: 0})


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_a_vae_of_another_downsampling_is_refused_before_anything_is_written(tmp_path, images, layout):
    vae = load_vae(str(TINY_VAE))
    settings = ExtractionSettings(vae="vae_tiny", resolution=64, layout=layout)
    with pytest.raises(
        InputError, match="the VAE vae_tiny makes latents of 1/2 of the image's side; the model takes 1/8"
    ):
        extract_features(images, tmp_path / "out", settings, vae)
    assert not list(tmp_path.iterdir())
