import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from latent_diffusion import features
from latent_diffusion.errors import InputError
from latent_diffusion.features import TrainingStream
from latent_diffusion.loader import StreamBatchSampler, TrainingLoader
from latent_diffusion.packed import PackedWriter
from latent_diffusion.records import CONTEXTS, MOMENTS, ImageContents, TextContents
from uvit_ldm.feature_files import count_captions
from uvit_ldm.features import open_features
from uvit_ldm.objective import make_objective

from .conftest import DATA, uvit_config

TINY = DATA / "coco_features_tiny"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the reference features, for a test to spoil."""
    return shutil.copytree(TINY, tmp_path / "features")


@pytest.fixture
def packed(tmp_path) -> Path:
    return pack(tmp_path / "packed")


def pack(target: Path, owners: list[int] | None = None, moments_shape=(8, 8, 8), context_shape=(7, 32)) -> Path:
    """The training split of the reference features, packed; its captions belong to the images `owners`."""
    counts = count_captions(TINY / "train")
    pairs = [(i, k) for i, count in enumerate(counts) for k in range(count)]
    moments = np.stack([np.load(TINY / f"train/{i}.npy") for i in range(len(counts))])
    contexts = np.stack([np.load(TINY / f"train/{i}_{k}.npy") for i, k in pairs])
    records = {
        "images": moments[:, None, : moments_shape[0], : moments_shape[1]],
        "captions": contexts[:, None, None, : context_shape[0]],
    }
    contents = {
        "images": ImageContents(MOMENTS, (1, *moments_shape), "float32", len(moments), 64, 0.2301),
        "captions": TextContents(CONTEXTS, (1, 1, *context_shape), "float32", len(contexts), "clip", "clip", "a1"),
    }
    labels = {"images": range(10, 10 + len(moments)), "captions": owners or [i for i, _ in pairs]}
    for kind in ("images", "captions"):
        writer = PackedWriter(target / "train" / kind, contents[kind])
        writer.claim()
        writer.write(range(len(records[kind])), records[kind], labels[kind])
        writer.finish([])
    shutil.copy(TINY / "empty_context.npy", target)
    return target


def test_the_settings_of_captions_change_with_them_and_not_with_their_place(folder, packed, tiny_config):
    def settings(path):
        return open_features(path, tiny_config).settings()

    expected = settings(TINY)
    assert settings(folder) == settings(packed) == expected
    caption = np.load(folder / "train/2_0.npy")
    np.save(folder / "train/2_0.npy", caption + 1)
    assert settings(folder) != expected
    np.save(folder / "train/2_0.npy", caption)
    assert settings(folder) == expected
    np.save(folder / "train/0_2.npy", caption)
    assert settings(folder) != expected


def samples(store, index: int, count: int) -> list[dict[str, np.ndarray]]:
    return [store.sample(index, np.random.default_rng(seed)) for seed in range(count)]


def captions(split: str, image: int) -> list[bytes]:
    return [np.load(TINY / f"{split}/{image}_{k}.npy").tobytes() for k in range(count_captions(TINY / split)[image])]


def test_the_reference_features_are_read(tiny_config):
    known = json.loads((DATA / "coco_features_tiny.json").read_text())["splits"]
    for split in ("train", "val"):
        store = open_features(TINY, tiny_config, split)
        assert len(store) == len(known[split])
        for image, values in known[split].items():
            assert store.captions[int(image)] == values["n_captions"]
            assert store._moments(int(image)).sum() == pytest.approx(values["moments_sum"], rel=1e-5)
            found = [store._context(int(image), k).sum() for k in range(values["n_captions"])]
            assert found == pytest.approx(values["caption_sums"], rel=1e-4)


class FixedNoise:
    """A generator whose normal values are known."""

    def __init__(self, noise: np.ndarray):
        self.noise, self.rng = noise, np.random.default_rng(0)

    def standard_normal(self, shape, dtype):
        assert shape == self.noise.shape and dtype == self.noise.dtype
        return self.noise

    def integers(self, count):
        return self.rng.integers(count)

    def random(self):
        return self.rng.random()


@pytest.mark.parametrize("case", ["ae", "ae_clamp"])
def test_latents_are_those_of_the_reference(tmp_path, golden, golden_json, case):
    """Moments of which some log variances lie beyond [-30, 20] included."""
    arrays = golden("losses_batches")
    for moments, noise, expected in zip(*(arrays[f"{case}_{name}"] for name in ("moments", "noise", "z")), strict=True):
        side = max(expected.shape)
        padding = [(0, 0)] + [(0, side - length) for length in expected.shape[1:]]
        (tmp_path / "train").mkdir(exist_ok=True)
        np.save(tmp_path / "train/0.npy", np.pad(moments, padding))
        shutil.copy(TINY / "train/0_0.npy", tmp_path / "train")
        shutil.copy(TINY / "empty_context.npy", tmp_path)
        config = uvit_config(golden_json("config")["nnet"] | {"img_size": side})
        found = open_features(tmp_path, config).sample(0, FixedNoise(np.pad(noise, padding)))["latents"]
        assert found.dtype == np.float32
        found = found[tuple(slice(length) for length in expected.shape)]
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_a_caption_is_drawn_and_dropped_at_times(request, tiny_config, layout):
    store = open_features(TINY if layout == "files" else request.getfixturevalue("packed"), tiny_config)
    found = [sample["contexts"].tobytes() for sample in samples(store, 1, 2000)]
    known = captions("train", 1)
    assert store.empty_context.shape == (7, 32) and store.empty_context.dtype == np.float32
    dropped = found.count(store.empty_context.tobytes())
    assert 150 < dropped < 250
    counts = [found.count(caption) for caption in known]
    assert sum(counts) + dropped == 2000 and all(300 < count < 420 for count in counts)


def test_no_caption_is_dropped_in_validation(tiny_config):
    store = open_features(TINY, tiny_config, "val")
    found = {sample["contexts"].tobytes() for sample in samples(store, 0, 300)}
    assert found == set(captions("val", 0))


def test_both_layouts_give_the_same_samples(tiny_config, packed):
    stores = [open_features(path, tiny_config) for path in (TINY, packed)]
    assert len(stores[0]) == len(stores[1]) == 3
    for index in range(3):
        for first, second in zip(*(samples(store, index, 30) for store in stores), strict=True):
            assert first.keys() == second.keys() == {"latents", "contexts"}
            for name in first:
                assert first[name].dtype == second[name].dtype == np.float32
                np.testing.assert_array_equal(first[name], second[name])


def test_half_precision_is_read(folder, tiny_config):
    for path in folder.rglob("train/*.npy"):
        np.save(path, np.load(path).astype(np.float16))
    found, expected = (open_features(path, tiny_config).sample(2, np.random.default_rng(0)) for path in (folder, TINY))
    for name in found:
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-2, atol=1e-2)


def test_a_sample_differs_in_every_epoch_and_not_by_workers(tiny_config):
    stream = TrainingStream(open_features(TINY, tiny_config), make_objective(), seed=0)
    epochs = [sorted(stream[3 * epoch + k]["latents"].tobytes() for k in range(3)) for epoch in range(2)]
    assert not set(epochs[0]) & set(epochs[1])
    alone, shared = (list(TrainingLoader(stream, StreamBatchSampler(2, 0, 6), workers)) for workers in (0, 2))
    for first, second in zip(alone, shared, strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name].numpy(), second[name].numpy())


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def save(name: str, array: np.ndarray):
    return lambda folder: np.save(folder / name, array)


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("train/1.npy"), r"train/1\.npy is missing"),
        (remove("train/1_1.npy"), r"train/1_1\.npy is missing"),
        (remove("empty_context.npy"), r"empty_context\.npy is missing"),
        (cut("train/0.npy"), r"cannot read the feature file .*train/0\.npy"),
        (cut("train/2_1.npy"), r"cannot read the feature file .*train/2_1\.npy"),
        (save("train/0.npy", np.zeros((8, 8, 4), "f4")), r"0\.npy has shape \(8, 8, 4\), expected \(8, 8, 8\)"),
        (save("train/0.npy", np.zeros((4, 8, 8), "f4")), r"0\.npy has shape \(4, 8, 8\), expected \(8, 8, 8\)"),
        (save("train/1_3.npy", np.zeros((77, 32), "f4")), r"1_3\.npy has shape \(77, 32\), expected \(7, 32\)"),
        (save("empty_context.npy", np.zeros((7, 31), "f4")), r"empty_context\.npy has shape \(7, 31\)"),
        (save("train/2.npy", np.full((8, 8, 8), np.inf, "f4")), r"2\.npy holds values that are not finite"),
        (
            lambda folder: shutil.rmtree(folder / "train"),
            "train does not exist; found there: empty_context.npy, run_vis",
        ),
        (lambda folder: shutil.rmtree(folder), "features/train does not exist; make it with extract_coco_features.py"),
        (
            lambda folder: (folder / "train_captions_manifest.json").write_text('{"layout": "files"}'),
            "train_captions_manifest.json lists no skipped images: the extraction is not complete",
        ),
        (
            lambda folder: (folder / "train_images_manifest.json").write_text('{"skipped": [], "images": 99}'),
            "train_images_manifest.json says there are 99 images, but there are",
        ),
        (save("train/0.npy", np.zeros((8, 8, 8), "i4")), r"0\.npy holds int32, not floating-point numbers"),
    ],
)
def test_bad_features_are_named(folder, tiny_config, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message) as error:
        open_features(folder, tiny_config)
    assert "\n" not in str(error.value)


def test_the_folder_of_a_split_in_place_of_its_parent_is_named_in_short(tiny_config):
    with pytest.raises(InputError, match=r"train/train does not exist; found there: 0\.npy, .* and 5 more; make it"):
        open_features(TINY / "train", tiny_config)


def test_not_every_file_is_opened_up_front(folder, tiny_config, monkeypatch):
    """What is not opened then is named when training reads it."""
    monkeypatch.setattr(features, "IMAGES_CHECKED", 2)
    cut("train/1_2.npy")(folder)
    store = open_features(folder, tiny_config)
    with pytest.raises(InputError, match=r"train/1_2\.npy"):
        samples(store, 1, 50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"moments_shape": (8, 4, 8)},
            r"train/images are moments of latents \(4, 4, 8\), the model takes .*\(4, 8, 8\)",
        ),
        ({"context_shape": (6, 32)}, r"train/captions are contexts \(6, 32\), the model takes \(7, 32\)"),
        ({"owners": [0] * 5 + [2] * 5}, "labels.npy does not give each image of .*train/images its captions"),
        ({"owners": [0, 1, 2, 0, 1, 2, 0, 1, 2, 2]}, "labels.npy does not give each image"),
        ({"owners": [0, 0, 1, 1, 1, 1, 2, 2, 2, 3]}, "labels.npy does not give each image"),
    ],
)
def test_packed_features_that_do_not_fit_are_named(tmp_path, tiny_config, changes, message):
    with pytest.raises(InputError, match=message):
        open_features(pack(tmp_path / "packed", **changes), tiny_config)


def test_packed_images_without_captions_are_incomplete(packed, tiny_config):
    shutil.rmtree(packed / "train/captions")
    with pytest.raises(InputError, match="cannot read .*train/captions/manifest.json"):
        open_features(packed, tiny_config)


@pytest.mark.parametrize("kind", ["images", "captions"])
def test_an_unfinished_extraction_is_named(packed, tiny_config, kind):
    (packed / f"train/{kind}").rename(packed / f"train/{kind}.partial")
    with pytest.raises(InputError, match=rf"train/{kind}\.partial is there: the extraction is not complete"):
        open_features(packed, tiny_config)


def test_captions_in_place_of_images_are_refused(packed, tiny_config):
    shutil.rmtree(packed / "train/images")
    shutil.copytree(packed / "train/captions", packed / "train/images")
    with pytest.raises(InputError, match="train/images/manifest.json has 'contexts' for 'content'"):
        open_features(packed, tiny_config)
