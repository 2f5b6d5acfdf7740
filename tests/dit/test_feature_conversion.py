import json
from pathlib import Path

import numpy as np
import pytest

from dit.extraction import sample_latents
from dit.feature_conversion import convert_features
from dit.feature_files import FeatureFilesWriter, feature_folders
from latent_diffusion import packed
from latent_diffusion.errors import InputError
from latent_diffusion.packed import PackedReader, PackedWriter
from latent_diffusion.records import ImageContents


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Five records a shard."""
    monkeypatch.setattr(packed, "RECORDS_PER_SHARD", 5)


def extracted(folder: Path, writer_class, content="latents", views=2, dtype="float32", skipped=()) -> np.ndarray:
    """A folder of twelve images with everything extraction writes."""
    channels = 4 if content == "latents" else 8
    shape = (views, channels, 8, 8)
    contents = ImageContents(content, shape, dtype, 12, 64, 0.5, "tiny", "center, ADM", 3, ("cat", "dog"), "a1b2")
    records = np.random.default_rng(0).standard_normal((12, *shape)).astype(dtype)
    kept = [number for number in range(12) if number not in skipped]
    writer = writer_class(folder, contents)
    writer.claim()
    writer.write(kept, records[kept], [number % 2 for number in kept])
    writer.finish([f"cat/{number}.png" for number in skipped])
    return records


def foreign(folder: Path, names, shape=(1, 4, 8, 8), dtype="float32", flip=False) -> None:
    """As another program writes them: without a manifest."""
    latents, labels, flipped = feature_folders(folder, 64)
    for kind in [latents, labels] + [flipped] * flip:
        kind.mkdir(parents=True)
    for value, name in enumerate(names):
        np.save(latents / f"{name}.npy", np.full(shape, value, dtype))
        np.save(labels / f"{name}.npy", np.array([value % 3]))
        if flip:
            np.save(flipped / f"{name}.npy", np.full(shape, -value, dtype))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("skipped", [(), (3, 11)])
def test_files_come_back_bit_by_bit_with_their_manifest(tmp_path, views, dtype, skipped):
    extracted(tmp_path / "files", FeatureFilesWriter, views=views, dtype=dtype, skipped=skipped)
    convert_features(tmp_path / "files", tmp_path / "packed", "packed")
    convert_features(tmp_path / "packed", tmp_path / "back", "files")
    assert content(tmp_path / "back") == content(tmp_path / "files")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "files", "packed"]


@pytest.mark.parametrize("flip", [False, True])
def test_files_of_another_program_come_back(tmp_path, flip):
    foreign(tmp_path / "files", range(12), flip=flip)
    convert_features(tmp_path / "files", tmp_path / "packed", "packed", scaling_factor=0.18215)
    convert_features(tmp_path / "packed", tmp_path / "back", "files")
    back = content(tmp_path / "back")
    manifest = json.loads(back.pop("imagenet64_manifest.json"))
    assert manifest["scaling_factor"] == 0.18215 and manifest["image_list_sha256"] is None
    assert back == content(tmp_path / "files")


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 4, 8, 8)])
def test_files_with_any_names_are_numbered_in_their_order(tmp_path, shape):
    foreign(tmp_path / "files", ["b", "10", "a"], shape=shape)
    convert_features(tmp_path / "files", tmp_path / "packed", "packed", scaling_factor=1.0)
    reader = PackedReader(tmp_path / "packed")
    assert reader.read([0, 1, 2], [0, 0, 0])[:, 0, 0, 0].tolist() == [1, 2, 0]
    assert reader.labels.tolist() == [1, 2, 0]


def test_moments_become_samples_by_seed_and_number(tmp_path):
    moments = extracted(tmp_path / "packed", PackedWriter, content="moments", dtype="float16")
    convert_features(tmp_path / "packed", tmp_path / "files", "files", seed=7)
    expected = sample_latents(moments, range(12), 7, 0.5).astype(np.float16)
    for number in range(12):
        for view, kind in enumerate(("features", "features_flip")):
            found = np.load(tmp_path / f"files/imagenet64_{kind}/{number}.npy")
            np.testing.assert_array_equal(found, expected[number, view][None])
    manifest = json.loads((tmp_path / "files/imagenet64_manifest.json").read_text())
    assert manifest["seed"] == 7 and manifest["content"] == "latents" and manifest["vae"] == "tiny"
    assert manifest["image_list_sha256"] == "a1b2"


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_a_changed_source_is_found_and_nothing_is_written(tmp_path, layout):
    source, target = tmp_path / "source", tmp_path / "target"
    if layout == "packed":
        extracted(source, FeatureFilesWriter)
        changed = source / "imagenet64_features_flip/11.npy"
    else:
        extracted(source, PackedWriter)
        changed = source / "shard-00002.npy"
    changed.write_bytes(changed.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(InputError, match="checksum"):
        convert_features(source, target, layout)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_cannot_be_converted_is_named(tmp_path):
    foreign(tmp_path / "foreign", range(3))
    extracted(tmp_path / "files", FeatureFilesWriter)
    extracted(tmp_path / "packed", PackedWriter)

    def refused(source: str, layout: str, message: str, target: str = "target", **settings) -> None:
        with pytest.raises(InputError, match=message):
            convert_features(tmp_path / source, tmp_path / target, layout, **settings)
        assert not (tmp_path / "target").exists()

    refused("packed", "packed", "not in the other layout")
    refused("files", "files", "not in the other layout")
    refused("files", "packed", "packed exists; choose another", target="packed")
    refused("foreign", "packed", "say with --scaling-factor")
    refused("files", "packed", "--scaling-factor 0.25 contradicts .*imagenet64_manifest.json", scaling_factor=0.25)
    refused("nowhere", "packed", "nowhere must hold one folder imagenet<resolution>_features, but holds 0")
    refused("packed", "files", "seed must be at least 0", seed=-1)
    np.save(tmp_path / "foreign/imagenet64_features/2.npy", np.zeros((4, 8, 8), np.float16))
    refused("foreign", "packed", "2.npy holds float16, the others float32", scaling_factor=1.0)
    (tmp_path / "files/imagenet64_features/99.npy").touch()
    refused("files", "packed", "imagenet64_labels/99.npy is missing")
    (tmp_path / "files/imagenet64_labels/99.npy").touch()
    (tmp_path / "files/imagenet64_features_flip/99.npy").touch()
    refused("files", "packed", "99.npy is no file of the 12")
    extracted(tmp_path / "others", FeatureFilesWriter)
    for path in (tmp_path / "others").glob("*/3.npy"):
        path.unlink()
    refused("others", "packed", "says there are 12 images, 0 of them skipped, but there are 11")
    (tmp_path / "foreign/imagenet64_features/0.npy").write_bytes(b"")
    refused("foreign", "packed", "cannot read the feature file .*0.npy", scaling_factor=1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"records": 10**15}, "says there are 1000000000000000 images, 0 of them skipped, but there are 12"),
        ({"sha256": None}, "has no checksum of the features"),
        ({"scaling_factor": 10**400}, "for 'scaling_factor', which cannot be"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_at_once(tmp_path, values, message):
    extracted(tmp_path / "files", FeatureFilesWriter)
    manifest = tmp_path / "files/imagenet64_manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | values))
    with pytest.raises(InputError, match=message):
        convert_features(tmp_path / "files", tmp_path / "packed", "packed")


def test_an_unfinished_extraction_is_not_converted(tmp_path):
    extracted(tmp_path / "files", FeatureFilesWriter)
    manifest = tmp_path / "files/imagenet64_manifest.json"
    values = json.loads(manifest.read_text())
    del values["sha256"], values["skipped"]
    manifest.write_text(json.dumps(values))
    with pytest.raises(InputError, match="imagenet64_manifest.json .* extraction is not complete"):
        convert_features(tmp_path / "files", tmp_path / "packed", "packed")
