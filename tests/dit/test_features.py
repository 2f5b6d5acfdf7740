import json
from pathlib import Path

import numpy as np
import pytest

from dit.configuration import DiTConfig
from dit.feature_conversion import convert_features
from dit.feature_files import feature_folders
from dit.features import FastDiTFeatures, PackedFeatures, open_features
from latent_diffusion import features, packed
from latent_diffusion.errors import InputError
from latent_diffusion.features import TrainingStream
from latent_diffusion.loader import StreamBatchSampler, TrainingLoader
from latent_diffusion.objectives import LearnedRangeDDPM
from latent_diffusion.packed import PackedWriter
from latent_diffusion.records import ImageContents
from latent_diffusion.schedules import NoiseSchedule

SHAPE = (4, 8, 8)


def config(**settings) -> DiTConfig:
    values = {"sample_size": 8, "num_classes": 10, "class_dropout_prob": 0.0} | settings
    return DiTConfig(patch_size=2, in_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, **values)


def write(root: Path, names, flip: bool = False, dtype: str = "float32", shape=(1, *SHAPE)) -> None:
    """Latents that hold the number of their name (its negative when mirrored), labels that are its last digit."""
    latents, labels, flipped = feature_folders(root, 64)
    for folder in (latents, labels, *([flipped] if flip else [])):
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        np.save(latents / f"{name}.npy", np.full(shape, name, dtype))
        np.save(labels / f"{name}.npy", np.array([name % 10]))
        if flip:
            np.save(flipped / f"{name}.npy", np.full(shape, -name, dtype))


def sample(store: FastDiTFeatures, index: int, seed: int = 0) -> tuple[np.ndarray, int]:
    found = store.sample(index, np.random.default_rng(seed))
    return found["latents"], int(found["labels"])


def test_latents_and_labels_are_paired_by_name(tmp_path):
    """Not by position: in a sorted listing 10 comes before 9."""
    write(tmp_path, [9, 10, 2, 31])
    store = FastDiTFeatures(tmp_path, config())
    assert len(store) == 4
    found = [sample(store, index) for index in range(4)]
    assert {int(latents[0, 0, 0]): label for latents, label in found} == {9: 9, 10: 0, 2: 2, 31: 1}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [SHAPE, (1, *SHAPE)])
def test_both_shapes_and_types_are_read(tmp_path, dtype, shape):
    write(tmp_path, [3], dtype=dtype, shape=shape)
    latents, label = sample(FastDiTFeatures(tmp_path, config()), 0)
    assert latents.dtype == np.float32 and latents.shape == SHAPE
    assert (latents == 3).all() and label == 3


def test_a_label_may_be_a_scalar(tmp_path):
    write(tmp_path, [3])
    np.save(tmp_path / "imagenet64_labels" / "3.npy", np.int32(7))
    assert sample(FastDiTFeatures(tmp_path, config()), 0)[1] == 7


@pytest.mark.parametrize("kind", ["features", "labels", "features_flip"])
def test_a_missing_twin_is_named(tmp_path, kind):
    write(tmp_path, range(5), flip=True)
    (tmp_path / f"imagenet64_{kind}" / "3.npy").unlink()
    with pytest.raises(InputError, match=rf"imagenet64_{kind}/3\.npy is missing"):
        FastDiTFeatures(tmp_path, config(), use_flip=True)


def test_mirrored_latents_that_were_not_extracted_are_missed(tmp_path):
    write(tmp_path, range(5))
    with pytest.raises(InputError, match="imagenet64_features_flip"):
        FastDiTFeatures(tmp_path, config(), use_flip=True)


@pytest.mark.parametrize("folder", ["features", "features_flip"])
def test_a_wrong_shape_is_named(tmp_path, folder):
    write(tmp_path, range(5), flip=True)
    np.save(tmp_path / f"imagenet64_{folder}" / "2.npy", np.zeros((1, 4, 16, 16), np.float32))
    with pytest.raises(InputError, match=rf"imagenet64_{folder}/2\.npy has shape .*expected \(4, 8, 8\)"):
        FastDiTFeatures(tmp_path, config(), use_flip=True)


@pytest.mark.parametrize("label", [10, -1, 3.0])
def test_a_label_that_is_no_class_is_named(tmp_path, label):
    write(tmp_path, range(5))
    np.save(tmp_path / "imagenet64_labels" / "2.npy", np.array([label]))
    with pytest.raises(InputError, match=r"imagenet64_labels/2\.npy holds .* not a class in \[0, 10\)"):
        FastDiTFeatures(tmp_path, config())


def test_an_empty_folder_is_named(tmp_path):
    write(tmp_path, [])
    with pytest.raises(InputError, match="imagenet64_features holds no .npy file"):
        FastDiTFeatures(tmp_path, config())


def test_a_missing_folder_is_named_with_what_is_there(tmp_path):
    write(tmp_path, [1])
    with pytest.raises(InputError, match="imagenet128_features does not exist; found there: imagenet64_features"):
        FastDiTFeatures(tmp_path, config(sample_size=16))
    with pytest.raises(
        InputError, match=r"nowhere/imagenet64_features does not exist, nor does .*nowhere/manifest.json"
    ):
        FastDiTFeatures(tmp_path / "nowhere", config())


def test_mirrored_latents_are_taken_half_of_the_time(tmp_path):
    write(tmp_path, [7], flip=True)
    with_flip, without = (FastDiTFeatures(tmp_path, config(), use_flip=flip) for flip in (True, False))
    mirrored = sum(sample(with_flip, 0, seed)[0][0, 0, 0] == -7 for seed in range(400))
    assert 160 < mirrored < 240
    assert all(sample(without, 0, seed)[0][0, 0, 0] == 7 for seed in range(20))


@pytest.mark.parametrize(("rate", "least", "most"), [(0.25, 70, 130), (0.0, 0, 0), (1.0, 400, 400)])
def test_labels_are_replaced_by_the_null_class_at_the_rate(tmp_path, rate, least, most):
    write(tmp_path, [7])
    store = FastDiTFeatures(tmp_path, config(class_dropout_prob=rate))
    labels = [sample(store, 0, seed)[1] for seed in range(400)]
    assert set(labels) <= {7, 10}
    assert least <= labels.count(10) <= most


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_met_later_is_named(tmp_path, monkeypatch, workers):
    """Up front only some files are opened; the others are checked when they are read, in a worker or not."""
    monkeypatch.setattr(features, "IMAGES_CHECKED", 2)
    write(tmp_path, range(10))
    bad = tmp_path / "imagenet64_features" / "4.npy"
    bad.write_bytes(bad.read_bytes()[:200])
    store = FastDiTFeatures(tmp_path, config())
    stream = TrainingStream(store, LearnedRangeDDPM(NoiseSchedule.linear()), seed=0)
    with pytest.raises(InputError) as error:
        list(TrainingLoader(stream, StreamBatchSampler(2, 0, 5), workers))
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skipped": [], "images": 11}, "says there are 11 images, but there are 10; restore the others"),
        ({"images": 10}, "the extraction is not complete"),
        ({"skipped": [], "images": "10"}, "has '10' for 'images', which cannot be"),
    ],
)
def test_fewer_files_than_the_manifest_says_are_refused(tmp_path, values, message):
    """A label and its latents, both lost, would be missed by nobody."""
    write(tmp_path, range(10))
    (tmp_path / "imagenet64_manifest.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        FastDiTFeatures(tmp_path, config())


def test_files_may_be_added_to_those_of_the_manifest(tmp_path):
    write(tmp_path, range(10))
    (tmp_path / "imagenet64_manifest.json").write_text(json.dumps({"skipped": [], "images": 9}))
    assert len(FastDiTFeatures(tmp_path, config())) == 10


# A packed image: channel means and standard deviations of its posterior; its mirror has the negative means.
MEANS, STDS = np.array([3.0, -1.0, 0.5, 10.0]), np.array([0.5, 1.0, 2.0, 0.1])


def write_packed(root: Path, count: int = 3, content: str = "moments", views: int = 2, labels=None) -> None:
    values = np.concatenate([MEANS, 2 * np.log(STDS)])[:, None, None] * np.ones((8, 8))
    mirrored = np.concatenate([-MEANS, 2 * np.log(STDS)])[:, None, None] * np.ones((8, 8))
    channels = 8 if content == "moments" else 4
    record = np.stack([values, mirrored])[:views, :channels]
    writer = PackedWriter(root, ImageContents(content, record.shape, "float16", count, 64, 0.25))
    writer.claim()
    writer.write(range(count), np.stack([record] * count), list(range(count)) if labels is None else labels)
    writer.finish([])


def test_the_layout_is_found(tmp_path):
    write(tmp_path / "files", range(5))
    write_packed(tmp_path / "packed")
    assert isinstance(open_features(tmp_path / "files", config()), FastDiTFeatures)
    assert isinstance(open_features(str(tmp_path / "packed"), config()), PackedFeatures)


def test_repeated_samples_have_the_moments_of_both_views(tmp_path):
    write_packed(tmp_path)
    store = PackedFeatures(tmp_path, config())
    draws = np.stack([sample(store, 1, seed)[0] for seed in range(400)])
    assert draws.dtype == np.float32 and draws.shape == (400, *SHAPE)
    mirrored = draws[:, 3].mean(axis=(1, 2)) < 0
    assert 160 < mirrored.sum() < 240
    for views, sign in ((draws[~mirrored], 1), (draws[mirrored], -1)):
        np.testing.assert_allclose(views.mean(axis=(0, 2, 3)), sign * MEANS * 0.25, atol=0.03)
        np.testing.assert_allclose(views.std(axis=(0, 2, 3)), STDS * 0.25, rtol=0.03)
    np.testing.assert_array_equal(sample(store, 1, 5)[0], draws[5])


def test_packed_labels_are_dropped_at_the_rate(tmp_path):
    write_packed(tmp_path)
    store = PackedFeatures(tmp_path, config(class_dropout_prob=0.25))
    labels = [sample(store, 2, seed)[1] for seed in range(400)]
    assert set(labels) == {2, 10} and 70 <= labels.count(10) <= 130


@pytest.mark.parametrize("views", [1, 2])
def test_packed_latents_are_read_as_they_are(tmp_path, views):
    write_packed(tmp_path, content="latents", views=views)
    store = PackedFeatures(tmp_path, config())
    found = {float(sample(store, 0, seed)[0][0, 0, 0]) for seed in range(40)}
    assert found == ({3.0} if views == 1 else {3.0, -3.0})
    latents, _ = sample(store, 0)
    assert latents.dtype == np.float32 and latents.shape == SHAPE


def test_packed_and_file_features_give_the_same_samples(tmp_path):
    """The same latents in both layouts train alike: the random choices are drawn in the same order."""
    write(tmp_path / "files", range(5), flip=True)
    convert_features(tmp_path / "files", tmp_path / "packed", "packed", scaling_factor=1.0)
    dropping = config(class_dropout_prob=0.5)
    files, one = (open_features(tmp_path / name, dropping, use_flip=True) for name in ("files", "packed"))
    for index in range(5):
        for seed in range(20):
            (expected, label), (found, packed_label) = sample(files, index, seed), sample(one, index, seed)
            np.testing.assert_array_equal(found, expected)
            assert packed_label == label


def test_packed_features_of_another_size_are_refused(tmp_path):
    write_packed(tmp_path)
    with pytest.raises(InputError, match=r"latents \(4, 8, 8\) of images of 64 pixels, the model takes \(4, 16, 16\)"):
        PackedFeatures(tmp_path, config(sample_size=16))


def test_mirrored_latents_that_were_not_packed_are_missed(tmp_path):
    write_packed(tmp_path, content="latents", views=1)
    with pytest.raises(InputError, match="have no mirrored latents; leave --use_flip out"):
        PackedFeatures(tmp_path, config(), use_flip=True)


@pytest.mark.parametrize("label", [10, -2])
def test_a_packed_label_that_is_no_class_is_named(tmp_path, label):
    write_packed(tmp_path, labels=[1, label, 2])
    with pytest.raises(InputError, match=rf"record 1 of .*labels.npy holds {label}, not a class in \[0, 10\)"):
        PackedFeatures(tmp_path, config())


def test_packed_features_of_no_image_are_refused(tmp_path):
    write_packed(tmp_path, labels=[-1, -1, -1])
    with pytest.raises(InputError, match="are of no image"):
        PackedFeatures(tmp_path, config())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_met_later_is_named(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(packed, "RECORDS_PER_SHARD", 4)
    monkeypatch.setattr(packed, "HEAD_BYTES", 128)
    write_packed(tmp_path, count=10)
    shard = np.load(tmp_path / "shard-00001.npy", mmap_mode="r+")
    shard[2] = np.nan
    shard.flush()
    stream = TrainingStream(PackedFeatures(tmp_path, config()), LearnedRangeDDPM(NoiseSchedule.linear()), seed=0)
    with pytest.raises(InputError, match=r"record 2 of .*shard-00001\.npy"):
        list(TrainingLoader(stream, StreamBatchSampler(2, 0, 5), workers))


def test_loader_workers_read_the_same_packed_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "RECORDS_PER_SHARD", 4)
    write_packed(tmp_path, count=10)
    stream = TrainingStream(PackedFeatures(tmp_path, config()), LearnedRangeDDPM(NoiseSchedule.linear()), seed=0)
    alone, shared = (list(TrainingLoader(stream, StreamBatchSampler(2, 0, 10), workers)) for workers in (0, 2))
    for first, second in zip(alone, shared, strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name].numpy(), second[name].numpy())


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_a_sample_is_the_same_in_any_batch(tmp_path, layout):
    """Bit for bit; the epoch ends within the batch."""
    write_packed(tmp_path, count=5) if layout == "packed" else write(tmp_path, range(5))
    stream = TrainingStream(open_features(tmp_path, config()), LearnedRangeDDPM(NoiseSchedule.linear()), seed=0)
    positions = [3, 4, 5, 6, 7]
    batch, alone = stream.batch(positions), [stream[position] for position in positions]
    assert batch.keys() == {"latents", "labels", "t", "noise"}
    for name, values in batch.items():
        expected = np.stack([sample[name] for sample in alone])
        assert values.dtype == expected.dtype and values.tobytes() == expected.tobytes(), name


def test_a_packed_sample_draws_in_the_documented_order(tmp_path):
    write_packed(tmp_path, count=5)
    store, seed, epoch, offset = open_features(tmp_path, config()), 7, 2, 3
    index = int(np.random.default_rng([seed, epoch]).permutation(5)[offset])
    rng = np.random.default_rng([seed, epoch, index])
    moments = store.reader.read([index], [int(rng.integers(2))])[0]
    mean, log_variance = np.split(moments, 2)
    posterior_noise = rng.standard_normal((4, 8, 8), np.float32)
    dropped = rng.random() < config().class_dropout_prob
    t, noise = rng.integers(1000), rng.standard_normal((4, 8, 8), np.float32)
    found = TrainingStream(store, LearnedRangeDDPM(NoiseSchedule.linear()), seed).batch([5 * epoch + offset])
    scale = np.float32(store.contents.scaling_factor)
    np.testing.assert_array_equal(found["latents"][0], (mean + np.exp(0.5 * log_variance) * posterior_noise) * scale)
    assert found["labels"][0] == (config().num_classes if dropped else store.reader.labels[index])
    assert found["t"][0] == t
    np.testing.assert_array_equal(found["noise"][0], noise)
