import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_diffusion import array_files, extraction, packed
from latent_diffusion.errors import InputError
from latent_diffusion.images import crop_then_resize, read_image
from latent_diffusion.vae import encode_moments, load_vae
from tests.interruptions import interrupt_after
from uvit_ldm import feature_files
from uvit_ldm.captions import CaptionedImage
from uvit_ldm.configuration import UViTConfig
from uvit_ldm.extraction import ExtractionSettings, extract_features, write_prompts
from uvit_ldm.feature_files import read_prompts
from uvit_ldm.features import open_features

CONFIG = UViTConfig(8, 2, 4, 2, 2, 8, clip_dim=6, num_text_tokens=3)
CAPTIONS = {"a.jpg": ["one", "two"], "b/b.png": ["three"], "c.jpg": ["four", "five", "six"], "d.jpg": ["seven"]}
TINY_VAE = Path(__file__).parents[1] / "data" / "vae" / "vae_tiny"


class Encoder:
    """In place of a text encoder: contexts [3, 6] that follow from the text."""

    length, width = 3, 6

    def __init__(self, seed: str = ""):
        self.seed = seed

    def encode(self, texts):
        digests = [hashlib.sha256((self.seed + text).encode()).digest()[:18] for text in texts]
        return np.stack([np.frombuffer(digest, np.uint8).reshape(3, 6) for digest in digests]).astype(np.float32) / 100


@pytest.fixture(scope="module")
def images_path(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in CAPTIONS:
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 66, 3), dtype=np.uint8)).save(root / name)
    return root


def captioned() -> list[CaptionedImage]:
    return [CaptionedImage(30 + i, Path(name), list(texts)) for i, (name, texts) in enumerate(CAPTIONS.items())]


@pytest.fixture(scope="module")
def vae(vae_folder):
    return load_vae(str(vae_folder))


@pytest.fixture
def extract(images_path, vae):
    """`extract(folder, **changes)` -> how many images and captions were encoded."""

    def run(folder: Path, root=images_path, images=None, split="train", encoder=None, skip=False, **changes):
        settings = ExtractionSettings(**{"vae": "v", "text_encoder": "t", "tokenizer": "k", "resolution": 64} | changes)
        images, encoder = images or captioned(), encoder or Encoder()
        done = extract_features(root, images, folder, split, settings, vae, encoder, 2, 2, skip)
        return tuple(part.encoded for part in done)

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_layout_of_files(extract, tmp_path, images_path, vae):
    assert extract(tmp_path) == (4, 7)
    names = {f"train/{i}.npy" for i in range(4)}
    names |= {f"train/{i}_{k}.npy" for i, texts in enumerate(CAPTIONS.values()) for k in range(len(texts))}
    manifests = {"train_images_manifest.json", "train_captions_manifest.json"}
    assert content(tmp_path).keys() == names | manifests | {"empty_context.npy"}
    pixels = np.stack([read_image(images_path / name, 64, crop_then_resize) for name in CAPTIONS])
    expected = np.concatenate([encode_moments(vae, pixels[:2]), encode_moments(vae, pixels[2:])])
    for i, texts in enumerate(CAPTIONS.values()):
        np.testing.assert_array_equal(np.load(tmp_path / f"train/{i}.npy"), expected[i], strict=True)
        for k, text in enumerate(texts):
            np.testing.assert_array_equal(
                np.load(tmp_path / f"train/{i}_{k}.npy"), Encoder().encode([text])[0], strict=True
            )
    np.testing.assert_array_equal(np.load(tmp_path / "empty_context.npy"), Encoder().encode([""])[0], strict=True)


def test_the_packed_layout(extract, tmp_path):
    extract(tmp_path / "files")
    assert extract(tmp_path / "packed", layout="packed") == (4, 7)
    kinds = {f"train/{kind}/{name}" for kind in ("images", "captions") for name in ("manifest.json", "labels.npy")}
    shards = {f"train/{kind}/shard-00000.npy" for kind in ("images", "captions")}
    assert content(tmp_path / "packed").keys() == kinds | shards | {"empty_context.npy"}
    moments, contexts = (np.load(tmp_path / f"packed/train/{kind}/shard-00000.npy") for kind in ("images", "captions"))
    assert moments.dtype == contexts.dtype == np.float16
    assert moments.shape == (4, 1, 8, 8, 8) and contexts.shape == (7, 1, 1, 3, 6)
    np.testing.assert_array_equal(moments[2, 0], np.load(tmp_path / "files/train/2.npy").astype("f2"))
    np.testing.assert_array_equal(contexts[4, 0, 0], np.load(tmp_path / "files/train/2_1.npy").astype("f2"))
    assert np.load(tmp_path / "packed/train/images/labels.npy").tolist() == [30, 31, 32, 33]
    assert np.load(tmp_path / "packed/train/captions/labels.npy").tolist() == [0, 0, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_the_manifests_say_how_features_were_made(extract, tmp_path, layout):
    extract(tmp_path, layout=layout, split="val")
    name = "val_{}_manifest.json" if layout == "files" else "val/{}/manifest.json"
    images, captions = (json.loads((tmp_path / name.format(kind)).read_text()) for kind in ("images", "captions"))
    assert images["vae"] == "v" and images["crop"] == "center, Lanczos" and images["scaling_factor"] == 0.5
    assert images["content"] == "moments" and images["images"] == images["records"] == 4 and images["skipped"] == []
    assert captions["text_encoder"] == "t" and captions["tokenizer"] == "k" and captions["content"] == "contexts"
    assert captions["captions"] == captions["records"] == 7 and captions["record_shape"] == [1, 1, 3, 6]
    assert not captions.keys() & {"resolution", "scaling_factor", "vae", "crop", "images"}


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_training_reads_what_was_written(extract, tmp_path, layout):
    for split in ("train", "val"):
        extract(tmp_path, layout=layout, dtype="float32", split=split)
    for split in ("train", "val"):
        store = open_features(tmp_path, CONFIG, split)
        assert store.captions.tolist() == [2, 1, 3, 1]
    found = {store.sample(2, np.random.default_rng(seed))["contexts"].tobytes() for seed in range(50)}
    assert found == {context.tobytes() for context in Encoder().encode(CAPTIONS["c.jpg"])}


@pytest.mark.parametrize(
    ("layout", "module", "function", "calls"),
    [("files", feature_files, "write_file", calls) for calls in (0, 1, 3, 4, 6)]
    + [("files", Path, "replace", calls) for calls in (0, 1, 5, 6, 8)]
    + [("files", array_files, "write_manifest", calls) for calls in (0, 1)]
    + [("packed", packed, "allocate", calls) for calls in (0, 1, 3)]
    + [("packed", packed, "write_rows", calls) for calls in (0, 1, 3, 7)]
    + [("packed", extraction, "publish_folder", calls) for calls in (0, 1)],
)
def test_an_interrupted_extraction_continues_to_the_same_files(
    extract, tmp_path, monkeypatch, layout, module, function, calls
):
    """Interrupted between any two files: of images, of captions, or at the end; training refuses what there is."""
    monkeypatch.setattr(packed, "RECORDS_PER_SHARD", 3)
    extract(tmp_path / "whole", layout=layout)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, module, function, calls)
        extract(tmp_path / "interrupted", layout=layout)
    with pytest.raises(InputError):
        open_features(tmp_path / "interrupted", CONFIG)
    extract(tmp_path / "interrupted", layout=layout)
    assert content(tmp_path / "interrupted") == content(tmp_path / "whole")
    assert extract(tmp_path / "interrupted", layout=layout) == (0, 0)


def test_a_file_that_lost_its_end_is_written_again(extract, tmp_path):
    """As a power failure may leave it."""
    extract(tmp_path)
    before = content(tmp_path)
    for name in ("train/3.npy", "train/2_1.npy"):
        (tmp_path / name).write_bytes(before[name][:150])
    assert extract(tmp_path) == (1, 1)
    assert content(tmp_path) == before


@pytest.mark.parametrize("layout", ["files", "packed"])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dtype": "float"}, "dtype"),
        ({"vae": "other"}, "vae 'v', not 'other'"),
        ({"text_encoder": "other"}, "text_encoder 't', not 'other'"),
        ({"tokenizer": "other"}, "tokenizer"),
        ({"images": [CaptionedImage(0, Path("a.jpg"), ["one"])]}, "records"),
        ({"images": [*captioned()[:3], CaptionedImage(33, Path("a.jpg"), ["seven"])]}, "image_list_sha256"),
        ({"images": [*captioned()[:3], CaptionedImage(33, Path("d.jpg"), ["eight"])]}, "text_list_sha256"),
    ],
)
def test_other_settings_on_the_same_folder_are_refused(extract, tmp_path, layout, change, name):
    if "dtype" in change:
        change = {"dtype": "float16" if layout == "files" else "float32"}
    extract(tmp_path, layout=layout)
    before = content(tmp_path)
    with pytest.raises(InputError, match=f"manifest.json says .* made with {name}"):
        extract(tmp_path, layout=layout, **change)
    assert content(tmp_path) == before


def test_another_text_encoder_does_not_share_the_empty_caption(extract, tmp_path):
    extract(tmp_path)
    with pytest.raises(InputError, match="empty_context.npy was made by another text encoder"):
        extract(tmp_path, split="val", encoder=Encoder("other"))


@pytest.mark.parametrize(("first", "second", "kind"), [("files", "packed", "in files"), ("packed", "files", "packed")])
def test_a_split_is_in_one_layout(extract, tmp_path, first, second, kind):
    extract(tmp_path, layout=first)
    before = content(tmp_path)
    with pytest.raises(InputError, match=f"train holds .*{kind}.*; choose another --features-path"):
        extract(tmp_path, layout=second)
    assert content(tmp_path) == before


@pytest.fixture
def spoiled(tmp_path, images_path) -> Path:
    """The images, of which the second is none."""
    folder = shutil.copytree(images_path, tmp_path / "spoiled")
    (folder / "b/b.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_an_unreadable_image_is_named_and_the_rest_is_kept(extract, tmp_path, images_path, spoiled, layout):
    for image in (spoiled / "b/b.png", spoiled / "d.jpg"):
        image.unlink()
        with pytest.raises(InputError, match=f"cannot read the image {image}"):
            extract(tmp_path / "features", root=spoiled, layout=layout)
        shutil.copy(images_path / image.relative_to(spoiled), image)
    assert extract(tmp_path / "features", root=spoiled, layout=layout) == (2, 7)


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_a_skipped_image_leaves_no_gap(extract, tmp_path, spoiled, capsys, layout):
    assert extract(tmp_path / "some", root=spoiled, layout=layout, skip=True) == (3, 6)
    assert f"skipped: cannot read the image {spoiled}/b/b.png" in capsys.readouterr().err
    assert open_features(tmp_path / "some", CONFIG).captions.tolist() == [2, 3, 1]
    name = "train_images_manifest.json" if layout == "files" else "train/images/manifest.json"
    manifest = json.loads((tmp_path / "some" / name).read_text())
    assert manifest["skipped"] == ["b/b.png"] and manifest["records"] == 3
    before = content(tmp_path / "some")
    assert extract(tmp_path / "some", root=spoiled, layout=layout, skip=True) == (0, 0)
    assert content(tmp_path / "some") == before


def test_no_readable_image_is_an_error(extract, tmp_path):
    with pytest.raises(InputError, match="none of the images of the captions file can be read from"):
        extract(tmp_path / "features", root=tmp_path, skip=True)
    with pytest.raises(InputError, match="the folder of images .*nowhere does not exist"):
        extract(tmp_path / "other", root=tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


def test_lost_contexts_are_missed(extract, tmp_path, monkeypatch):
    write = packed.PackedWriter.write

    def lose_all_but_one(self, numbers, records, labels):
        kept = 1 if records.shape[-1] == Encoder.width else None
        write(self, numbers[:kept], records[:kept], labels[:kept])

    monkeypatch.setattr(packed.PackedWriter, "write", lose_all_but_one)
    with pytest.raises(InputError, match=r"caption 1 \('two'\) has no features; run the same command again"):
        extract(tmp_path, layout="packed")


def test_prompts_replace_earlier_ones(extract, tmp_path):
    extract(tmp_path)
    write_prompts(tmp_path, ["a", "b", "c"], Encoder())
    write_prompts(tmp_path, ["x", "y"], Encoder())
    found = read_prompts(tmp_path, (Encoder.length, Encoder.width))
    assert [prompt for prompt, _ in found] == ["x", "y"]
    for prompt, context in found:
        np.testing.assert_array_equal(context, Encoder().encode([prompt])[0], strict=True)
    assert sorted(path.name for path in (tmp_path / "run_vis").iterdir()) == ["0.npy", "1.npy"]


@pytest.mark.parametrize("layout", ["files", "packed"])
@pytest.mark.parametrize("target", ["file.txt", "file.txt/deep"])
def test_a_folder_that_cannot_be_written_is_named(extract, tmp_path, layout, target):
    (tmp_path / "file.txt").touch()
    with pytest.raises(InputError, match=f"{target}.* choose another"):
        extract(tmp_path / target, layout=layout)
    assert content(tmp_path) == {"file.txt": b""}


@pytest.mark.parametrize("resolution", [0, 60])
def test_an_image_size_that_is_no_multiple_of_8_is_refused(resolution):
    with pytest.raises(InputError, match=f"the image size {resolution} is not a positive multiple of 8"):
        ExtractionSettings("v", "t", "k", resolution)


def test_a_vae_of_another_downsampling_is_refused_before_anything_is_written(tmp_path, images_path):
    settings = ExtractionSettings("vae_tiny", "t", "k", 64)
    with pytest.raises(InputError, match="the VAE vae_tiny makes latents of 1/2 of the image's side"):
        extract_features(
            images_path, captioned(), tmp_path / "out", "train", settings, load_vae(str(TINY_VAE)), Encoder()
        )
    assert not list(tmp_path.iterdir())
