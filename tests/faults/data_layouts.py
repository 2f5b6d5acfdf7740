"""Every layout that data is read from: a tiny valid folder of it, and what its readers make of one.

What is read is told apart by its file: `Values` has (path below the folder, what of it) and a checksum. So a value that
changed without its file, or that came from another one, shows.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit.configuration import DiTConfig
from dit.feature_files import FeatureFilesReader, FeatureFilesWriter, feature_folders, manifest_path
from dit.features import FastDiTFeatures, LabeledFeatures
from dit.features import open_features as open_dit_features
from dit.images import FolderImages, ImageStore
from latent_diffusion import packed
from latent_diffusion.evaluation.image_set import ImageArchive, ImageSet, open_images
from latent_diffusion.extraction import ImageSource
from latent_diffusion.features import TrainingStream
from latent_diffusion.images import crop_then_resize
from latent_diffusion.objectives import LearnedRangeDDPM
from latent_diffusion.packed import ABSENT, PackedReader, PackedWriter
from latent_diffusion.records import CONTEXTS, LATENTS, MOMENTS, ImageContents, RecordReader, RecordWriter, TextContents
from latent_diffusion.sample_folder import SampleFolder
from latent_diffusion.schedules import NoiseSchedule
from uvit_ldm.captions import CaptionedImage, read_captions, read_prompts_file
from uvit_ldm.configuration import UViTConfig
from uvit_ldm.feature_files import caption_name, image_name, read_prompts, write_prompt
from uvit_ldm.features import CocoFeatures, CocoFileFeatures
from uvit_ldm.features import open_features as open_coco_features

Values = dict[tuple[str, object], str]

NETWORK = {"sample_size": 8, "patch_size": 2, "num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 16}
DIT = DiTConfig(in_channels=4, num_classes=10, class_dropout_prob=0.0, **NETWORK)
UVIT = UViTConfig(in_channels=4, clip_dim=4, num_text_tokens=3, **NETWORK)
RESOLUTION, IMAGES, RECORDS_PER_SHARD = 64, 6, 3
CAPTIONS = (2, 1, 3, 1, 1, 2)
SETTINGS = {"seed": 0, "sampler": "ddpm"}


@dataclass(frozen=True)
class Layout:
    """A layout of data and its readers.

    Attributes:
        name: says which.
        build: fills an empty folder.
        open: what a command does at its start with the folder.
        values: what it reads then, all of it.
        checked: whether a file has a checksum that these readers compare.
    """

    name: str
    build: Callable[[Path], None]
    open: Callable[[Path], Any]
    values: Callable[[Any], Values]
    checked: Callable[[str], bool] = lambda path: False


def checksum(value: np.ndarray | str | int | list) -> str:
    """Of a value that was read; of floating-point numbers only finite ones are let through."""
    if not isinstance(value, np.ndarray):
        return hashlib.sha1(json.dumps(value).encode()).hexdigest()
    assert value.dtype.kind != "f" or np.isfinite(value).all(), "values that are not finite were let in"
    return hashlib.sha1(f"{value.dtype.str} {value.shape}".encode() + value.tobytes()).hexdigest()


# DiT: features


def image_contents(content: str, views: int) -> ImageContents:
    channels = 8 if content == MOMENTS else 4
    return ImageContents(content, (views, channels, 8, 8), "float16", IMAGES, RESOLUTION, 0.5, "vae", "center", 0)


def write_records(writer: RecordWriter, labels: list[int]) -> None:
    contents = writer.contents
    values = np.random.default_rng(contents.views).standard_normal((contents.records, *contents.record_shape))
    writer.claim()
    writer.write(range(contents.records), values.astype(contents.dtype), labels)
    writer.finish([])


def build_fastdit(folder: Path, views: int, with_manifest: bool) -> None:
    write_records(FeatureFilesWriter(folder, image_contents(LATENTS, views)), [7 - i for i in range(IMAGES)])
    if not with_manifest:
        manifest_path(folder, RESOLUTION).unlink()
        for i, parent in enumerate(feature_folders(folder, RESOLUTION)[: views + 1]):
            if i < 2:  # names of another program
                (parent / "1.npy").rename(parent / "1001.npy")


def build_packed(folder: Path, content: str) -> None:
    write_records(PackedWriter(folder, image_contents(content, 2)), [7 - i for i in range(IMAGES)])


class SmallShards:
    """Within the context shards have a few records, and only the start of each a checksum that is compared."""

    def __enter__(self) -> None:
        self.usual = packed.RECORDS_PER_SHARD, packed.HEAD_BYTES
        packed.RECORDS_PER_SHARD, packed.HEAD_BYTES = RECORDS_PER_SHARD, 1024

    def __exit__(self, *_: object) -> None:
        packed.RECORDS_PER_SHARD, packed.HEAD_BYTES = self.usual


def dit_values(store: LabeledFeatures) -> Values:
    values = fastdit_values(store) if isinstance(store, FastDiTFeatures) else packed_values(store.reader)
    for index, batch in training(store):
        assert batch["labels"] == store._label(index), "a label of another image"
        if isinstance(store, FastDiTFeatures):
            known = [store._latent(folder, index) for folder in store.latent_folders]
            assert any(np.array_equal(batch["latents"], latents) for latents in known), "latents of another image"
    return values


def training(store):
    """What the training of two epochs gets, image by image, with the number of each."""
    stream = TrainingStream(store, LearnedRangeDDPM(NoiseSchedule.linear()), seed=0)
    for start in range(0, 2 * len(stream), 4):
        positions = range(start, min(start + 4, 2 * len(stream)))
        batch = stream.batch(positions)
        for name, values in batch.items():
            assert values.dtype.kind != "f" or np.isfinite(values).all(), f"{name} that are not finite were let in"
        for k, position in enumerate(positions):
            yield stream.locate(position)[1], {name: values[k] for name, values in batch.items()}


def fastdit_values(store: FastDiTFeatures) -> Values:
    values = {}
    for index in range(len(store)):
        name = store.name(index)
        for folder in store.latent_folders:
            values[f"{folder.name}/{name}", "latents"] = checksum(store._latent(folder, index))
        values[f"{store.label_folder.name}/{name}", "label"] = checksum(store._label(index))
    return values


def packed_values(reader: PackedReader, folder: str = "") -> Values:
    values = {}
    for number in np.flatnonzero(reader.labels != ABSENT).tolist():
        shard = f"{folder}shard-{number // RECORDS_PER_SHARD:05}.npy"
        for view in range(reader.contents.views):
            values[shard, (number, view)] = checksum(reader.read([number], [view]))
        values[f"{folder}labels.npy", number] = checksum(int(reader.labels[number]))
    return values


def converted_values(reader: RecordReader) -> Values:
    return {("", number): checksum(record) + checksum(label) for number, record, label in reader}


# U-ViT: features


def build_coco_files(folder: Path) -> None:
    (folder / "train").mkdir()
    (folder / "run_vis").mkdir()
    rng = np.random.default_rng(0)

    def save(name: str, *shape: int) -> None:
        np.save(folder / name, rng.standard_normal(shape).astype(np.float32))

    save("empty_context.npy", *UVIT.context_shape)
    for image, captions in enumerate(CAPTIONS):
        save(f"train/{image_name(image)}", 8, 8, 8)
        for caption in range(captions):
            save(f"train/{caption_name(image, caption)}", *UVIT.context_shape)
    for kind, count in (("images", IMAGES), ("captions", sum(CAPTIONS))):
        (folder / f"train_{kind}_manifest.json").write_text(json.dumps({kind: count, "skipped": []}))
    for number in range(2):
        context = rng.standard_normal(UVIT.context_shape).astype(np.float32)
        write_prompt(folder / f"run_vis/{number}.npy", f"prompt {number}", context)


def build_coco_packed(folder: Path) -> None:
    owners = [image for image, captions in enumerate(CAPTIONS) for _ in range(captions)]
    texts = TextContents(CONTEXTS, (1, 1, *UVIT.context_shape), "float16", len(owners), "clip", "words", "a1")
    write_records(PackedWriter(folder / "train/images", image_contents(MOMENTS, 1)), [10 * i for i in range(IMAGES)])
    write_records(PackedWriter(folder / "train/captions", texts), owners)
    np.save(folder / "empty_context.npy", np.ones(UVIT.context_shape, np.float32))


def open_coco(folder: Path) -> tuple[CocoFeatures, list[tuple[str, np.ndarray]]]:
    return open_coco_features(folder, UVIT), read_prompts(folder, UVIT.context_shape)


def coco_values(opened: tuple[CocoFeatures, list[tuple[str, np.ndarray]]]) -> Values:
    store, prompts = opened
    values = {("run_vis", prompt): checksum(context) for prompt, context in prompts}
    values["empty_context.npy", ""] = checksum(store.empty_context)
    if isinstance(store, CocoFileFeatures):
        for image in range(len(store)):
            values[f"train/{image_name(image)}", ""] = checksum(store._moments(image))
            for caption in range(store.captions[image]):
                values[f"train/{caption_name(image, caption)}", ""] = checksum(store._context(image, caption))
    else:
        values |= packed_values(store.images, "train/images/") | packed_values(store.contexts, "train/captions/")
    for image, batch in training(store):
        known = [store.empty_context, *(store._context(image, k) for k in range(store.captions[image]))]
        assert any(np.array_equal(batch["contexts"], context) for context in known), "a caption of another image"
    return values


# Images


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (70, 66, 3), dtype=np.uint8)


def build_images(folder: Path) -> None:
    for i in range(IMAGES):
        path = folder / ("cat", "dog")[i % 2] / f"{i}.{('png', 'jpg', 'bmp')[i // 2]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(i)).save(path)


def build_shards(folder: Path) -> None:
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(3):
                image = io.BytesIO()
                Image.fromarray(pixels(3 * shard + i)).save(image, "JPEG")
                for name, data in ((f"{i}.jpg", image.getvalue()), (f"{i}.cls", b"%d" % i)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def open_image_store(folder: Path) -> tuple[Path, list[str], ImageStore]:
    store = ImageStore(folder, DIT)
    return folder, sorted(path.name for path in folder.iterdir() if path.is_dir()), store


def image_values(opened: tuple[Path, list[str], ImageStore]) -> Values:
    folder, classes, store = opened
    values = {}
    for index in range(len(store)):
        sample = store.sample(index, np.random.default_rng(0))
        if isinstance(store.images, FolderImages):
            key, place = os.path.relpath(store.images.paths[index], folder), 0
            # The number of a class is the position of its folder.
            label = classes[sample["labels"]]
        else:
            key, place = store.images.shards[store.images._shard[index]].name, int(store.images._offset[index])
            label = int(sample["labels"])
        values[key, place] = checksum(sample["images"])
        values[key, f"label {place}"] = checksum(label)
    for _ in training(store):
        pass
    return values


# Captions and prompts


def build_captions(folder: Path) -> None:
    (folder / "images").mkdir()
    entries = []
    for i in range(IMAGES):
        entries.append({"id": 100 - i, "file_name": f"{i}.png"})
        Image.fromarray(pixels(i)).save(folder / f"images/{i}.png")
    captions = [
        {"image_id": 100 - i, "caption": f"caption {k} of {i}"} for i in range(IMAGES) for k in range(CAPTIONS[i])
    ]
    (folder / "captions.json").write_text(json.dumps({"images": entries, "annotations": captions}))


def open_captions(folder: Path) -> tuple[Path, list[CaptionedImage]]:
    return folder / "images", read_captions(folder / "captions.json")


def caption_values(opened: tuple[Path, list[CaptionedImage]]) -> Values:
    folder, images = opened
    values = {("captions.json", str(image.name)): checksum(image.captions) for image in images}
    source = ImageSource(folder, [image.name for image in images], RESOLUTION, crop_then_resize, workers=1)
    for batch, found, _ in source.read_ahead([range(k, min(k + 4, len(images))) for k in range(0, len(images), 4)]):
        for number, image in zip(batch, found, strict=True):
            values[f"images/{images[number].name}", ""] = checksum(image)
    return values


def build_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a cat\n\nein Mädchen\n  two dogs \n", encoding="utf-8")


def prompt_values(prompts: list[str]) -> Values:
    return {("prompts.txt", number): checksum(prompt) for number, prompt in enumerate(prompts)}


# Sampled images


def build_samples(folder: Path) -> None:
    samples = SampleFolder(folder / "samples", IMAGES)
    samples.prepare(SETTINGS)
    for i in range(IMAGES):
        samples.save(i, pixels(i))


def open_samples(folder: Path) -> SampleFolder:
    samples = SampleFolder(folder / "samples", IMAGES)
    samples.prepare(SETTINGS)
    for index in samples.missing(range(IMAGES)):
        samples.save(index, pixels(index))
    return samples


def sample_values(samples: SampleFolder) -> Values:
    with np.load(samples.write_npz()) as archive:
        values = {(f"samples/{i:06}.png", "npz"): checksum(image) for i, image in enumerate(archive["arr_0"])}
    images = open_images(samples.path, workers=1)
    return values | evaluated_values(images, [f"samples/{name}" for name in images._source.names])


def archive_values(images: ImageSet) -> Values:
    return evaluated_values(images, ["images.npz"] * images.count)


def evaluated_values(images: ImageSet, names: list[str]) -> Values:
    """The values by the files that they are from."""
    batches = [range(k, min(k + 4, images.count)) for k in range(0, images.count, 4)]
    return {
        (names[number], number if isinstance(images, ImageArchive) else "evaluated"): checksum(image)
        for batch, found in images.read_ahead(batches)
        for number, image in zip(batch, found, strict=True)
    }


def build_archive(folder: Path) -> None:
    np.savez(folder / "images.npz", arr_0=np.stack([pixels(i) for i in range(IMAGES)]))


LAYOUTS = [
    Layout(
        "DiT files of another program",
        lambda folder: build_fastdit(folder, views=1, with_manifest=False),
        lambda folder: open_dit_features(folder, DIT),
        dit_values,
    ),
    Layout(
        "DiT files with mirrors",
        lambda folder: build_fastdit(folder, views=2, with_manifest=True),
        lambda folder: open_dit_features(folder, DIT, use_flip=True),
        dit_values,
    ),
    Layout(
        "DiT files with mirrors, converted",
        lambda folder: build_fastdit(folder, views=2, with_manifest=True),
        FeatureFilesReader,
        converted_values,
        lambda path: not path.endswith(".json"),
    ),
    Layout(
        "DiT files of another program, converted",
        lambda folder: build_fastdit(folder, views=1, with_manifest=False),
        lambda folder: FeatureFilesReader(folder, scaling_factor=0.5),
        converted_values,
    ),
    Layout(
        "DiT packed moments",
        lambda folder: build_packed(folder, MOMENTS),
        lambda folder: open_dit_features(folder, DIT),
        dit_values,
        lambda path: path.endswith("labels.npy"),
    ),
    Layout(
        "DiT packed latents, converted",
        lambda folder: build_packed(folder, LATENTS),
        PackedReader,
        converted_values,
        lambda path: path.endswith(".npy"),
    ),
    Layout("U-ViT files", build_coco_files, open_coco, coco_values),
    Layout("U-ViT packed", build_coco_packed, open_coco, coco_values, lambda path: path.endswith("labels.npy")),
    Layout("image folder", build_images, open_image_store, image_values),
    Layout("tar shards", build_shards, open_image_store, image_values),
    Layout("COCO images and captions", build_captions, open_captions, caption_values),
    Layout(
        "prompts",
        build_prompts,
        lambda folder: read_prompts_file(folder / "prompts.txt"),
        prompt_values,
    ),
    Layout("sample folder", build_samples, open_samples, sample_values),
    Layout("image archive", build_archive, lambda folder: open_images(folder / "images.npz"), archive_values),
]
