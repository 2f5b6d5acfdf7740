import json
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion import extraction as shared_extraction
from latent_diffusion import packed, row_files
from latent_diffusion.errors import InputError
from latent_diffusion.vae import encode_latents, load_vae
from sdxl_lora import extraction
from sdxl_lora.dataset import CaptionedImages, open_dataset
from sdxl_lora.extraction import cache_features
from sdxl_lora.features import CachedFeatures, OnlineFeatures, PromptContents, TokenizedCaptions
from sdxl_lora.text_encoders import TextEncoders
from tests.interruptions import interrupt_after

from .captioned import pixels, png, write_parquet

COUNT = 3
CAPTIONS = [["the digit three"], ["a cat", "the rain"], ["a digit"]]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> CaptionedImages:
    folder = tmp_path_factory.mktemp("images")
    write_parquet(folder / "train.parquet", [png(pixels(i, 80 + i, 64)) for i in range(COUNT)], CAPTIONS)
    return open_dataset(str(folder), None, None)


@pytest.fixture(scope="module")
def vae(vae_folder):
    return load_vae(str(vae_folder))


@pytest.fixture(scope="module")
def text_encoders(tiny_pipeline) -> TextEncoders:
    return TextEncoders.load(str(tiny_pipeline))


@pytest.fixture(scope="module")
def settings(images, vae, text_encoders) -> dict:
    """Of a cache of the images."""
    return {
        "images": images,
        "vae": vae,
        "text_encoders": text_encoders,
        "resolution": 64,
        "center_crop": True,
        "random_flip": False,
        "batch_size": 2,
        "num_workers": 2,
        "seed": 5,
    }


@pytest.fixture
def cache(settings, tmp_path):
    """`cache(**changes)` -> the folder of a cache with these settings."""
    return lambda **changes: cache_features(tmp_path, **settings | changes)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> dict[str, bytes]:
    """The files of a cache with random crops."""
    return content(cache_features(tmp_path_factory.mktemp("whole"), **settings | {"center_crop": False}))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def encode_online(features: OnlineFeatures, vae, index: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The latents that training makes of a sample, and the sample."""
    sample = features.sample(index, np.random.default_rng(seed))
    pixels, noise = (paddle.to_tensor(sample[name][None]) for name in ("images", "posterior_noise"))
    return encode_latents(vae, pixels, noise).numpy()[0], sample


def encode_text(text_encoders: TextEncoders, text: str) -> tuple[np.ndarray, np.ndarray]:
    tokens = {name: paddle.to_tensor(ids[None]) for name, ids in text_encoders.tokenize(text).items()}
    with paddle.no_grad():
        return tuple(values.numpy()[0] for values in text_encoders.encode(**tokens))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
def test_training_sees_the_latents_that_it_would_encode(cache, images, vae, text_encoders, dtype, tolerance):
    """The same draws give the same crop, mirror, posterior sample and caption."""
    cached = CachedFeatures(cache(random_flip=True, dtype=dtype))
    online = OnlineFeatures(images, text_encoders.tokenize, 4, 64, True, True)
    assert len(cached) == COUNT and cached.latent_shape == online.latent_shape == (4, 8, 8)
    for index in range(COUNT):
        for seed in range(4):
            found = cached.sample(index, np.random.default_rng(seed))
            expected, sample = encode_online(online, vae, index, seed)
            np.testing.assert_allclose(found["latents"], expected, atol=tolerance)
            np.testing.assert_array_equal(found["time_ids"], sample["time_ids"], strict=True)
            [text] = [t for t in CAPTIONS[index] if (text_encoders.tokenize(t)["tokens"] == sample["tokens"]).all()]
            for name, expected in zip(("contexts", "pooled"), encode_text(text_encoders, text), strict=True):
                np.testing.assert_allclose(found[name], expected, atol=2 * tolerance)
                assert found[name].dtype == np.float32


def test_the_latents_of_another_draw_are_others(cache):
    cached = CachedFeatures(cache(random_flip=True))
    samples = [cached.sample(0, np.random.default_rng(seed))["latents"] for seed in (0, 1)]
    assert np.abs(samples[0] - samples[1]).max() > 0.1


def test_a_random_crop_is_drawn_once_of_seed_and_index(cache):
    cached = CachedFeatures(cache(center_crop=False, seed=9))
    tops = [np.random.default_rng([9, i]).integers(80 + i - 64 + 1) for i in range(COUNT)]
    np.testing.assert_array_equal(cached.time_ids, [[80 + i, 64, tops[i], 0, 64, 64] for i in range(COUNT)])


def test_captions_are_tokens_where_text_encoders_are_trained(cache, images, text_encoders):
    folder = cache(text_encoders=None)
    cached = CachedFeatures(folder, TokenizedCaptions(images, text_encoders.tokenize))
    sample = cached.sample(0, np.random.default_rng(0))
    assert sample.keys() == {"latents", "time_ids", "tokens", "tokens_2"}
    np.testing.assert_array_equal(sample["tokens"], text_encoders.tokenize("the digit three")["tokens"])
    assert not (folder / "captions").exists()


def test_a_later_run_with_the_same_settings_encodes_nothing(cache, monkeypatch):
    folder = cache()
    before = content(folder)
    monkeypatch.setattr(extraction, "encode_moments", None)
    monkeypatch.setattr(TextEncoders, "encode", None)
    assert cache(seed=6) == folder  # which only random crops depend on
    assert content(folder) == before


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 72},
        {"center_crop": False},
        {"center_crop": False, "seed": 6},
        {"random_flip": True},
        {"dtype": "float16"},
        {"text_encoders": None},
        {"images": 1},
        {"vae": "changed"},
    ],
)
def test_other_settings_have_a_folder_of_their_own(cache, images, vae_folder, monkeypatch, change):
    for function in ("_cache_images", "_cache_captions"):
        monkeypatch.setattr(extraction, function, lambda *arguments: None)
    if "images" in change:
        change = {"images": open_dataset(images._name, None, None, max_train_samples=1)}
    if "vae" in change:
        change = {"vae": load_vae(str(vae_folder))}
        change["vae"].quant_conv.bias.set_value(change["vae"].quant_conv.bias + 1)
    folders = {cache(), cache(center_crop=False), cache(**change)}
    assert len(folders) == (2 if change == {"center_crop": False} else 3)
    assert all(json.loads((folder / "settings.json").read_text()) for folder in folders)


@pytest.mark.parametrize(
    ("module", "function", "calls"),
    [(extraction, "allocate", 0), (Path, "rename", 0)]
    + [(extraction, "write_rows", calls) for calls in (0, 1)]
    + [(packed, "allocate", calls) for calls in (1, 2)]
    + [(packed, "write_rows", calls) for calls in (1, 3, 5)]
    + [(shared_extraction, "publish_folder", calls) for calls in (0, 1)],
)
def test_an_interrupted_run_continues_to_the_same_files(cache, whole, monkeypatch, module, function, calls):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, module, function, calls)
        cache(center_crop=False)
    assert content(cache(center_crop=False)) == whole


def test_a_run_that_is_killed_while_it_makes_a_file_continues(cache, whole, monkeypatch):
    def die(path, shape, dtype):
        path.write_bytes(b"cut off")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extraction, "allocate", die)
        cache(center_crop=False)
    assert content(cache(center_crop=False)) == whole


def test_time_ids_are_on_the_disk_before_a_record_counts_as_done(cache, monkeypatch):
    written = []

    def note(path, rows, durable):
        written.append((path.name, durable))
        row_files.write_rows(path, rows, durable)

    for module in (extraction, packed):
        monkeypatch.setattr(module, "write_rows", note)
    cache(text_encoders=None)
    assert written == 2 * [("time_ids.npy", True), ("shard-00000.npy", True), ("labels.npy", False)]


def test_values_of_the_vae_that_are_not_finite_are_named(cache, monkeypatch):
    encode = extraction.encode_moments

    def overflow(vae, images):
        moments = encode(vae, images)
        moments[-1, 0, 0, 0] = np.inf
        return moments

    monkeypatch.setattr(extraction, "encode_moments", overflow)
    message = r"not finite for the image in row 1 .*; in float16 SDXL's own VAE overflows: give --vae_name madebyollin"
    with pytest.raises(InputError, match=message):
        cache()


def test_values_beyond_what_is_stored_are_named(cache, monkeypatch):
    monkeypatch.setattr(extraction, "encode_moments", lambda vae, images: np.full((len(images), 8, 8, 8), 1e5, "f4"))
    with pytest.raises(InputError, match="the VAE gives values that are not finite for the image in row 0"):
        cache(dtype="float16")
    cache(dtype="float32")


def test_contexts_that_are_not_finite_are_named(cache, monkeypatch):
    def overflow(self, tokens, tokens_2):
        batch = len(tokens)
        return paddle.full([batch, 16, 64], float("nan")), paddle.zeros([batch, 32])

    monkeypatch.setattr(TextEncoders, "encode", overflow)
    with pytest.raises(InputError, match="text encoders give values that are not finite for the caption 'the digit th"):
        cache()


def test_an_unreadable_image_is_named(cache, tmp_path):
    write_parquet(tmp_path / "data/train.parquet", [png(pixels(i, 64, 64))[: 9000 * (2 - i)] for i in range(2)], "ab")
    images = open_dataset(str(tmp_path / "data"), None, None)
    with pytest.raises(InputError, match=rf"cannot read the image in row 1 \(the first is 0\) of {tmp_path}/data: "):
        cache(images=images)


@pytest.mark.parametrize("name", ["time_ids.npy", "images/shard-00000.npy", "captions/labels.npy"])
def test_a_cache_with_a_damaged_file_is_refused(cache, name):
    path = cache() / name
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=str(path)):
        CachedFeatures(path.parents[name.count("/")])


@pytest.mark.parametrize("change", [{"tokens": 3000}, {"pooled_width": 31}, {"pooled_width": 5000}, {"tokens": 0}])
def test_captions_of_a_shape_that_cannot_be_are_refused(cache, change):
    manifest = cache() / "captions/manifest.json"
    values = json.loads(manifest.read_text())
    assert PromptContents.from_manifest(values, manifest).context_shape == (16, 64)
    with pytest.raises(InputError, match=f"{manifest} has "):
        PromptContents.from_manifest(values | change, manifest)
