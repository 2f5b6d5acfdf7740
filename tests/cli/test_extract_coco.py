"""Extraction of COCO's images and captions: by one process and two, killed in the middle, and what becomes of it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_diffusion.text_encoder import TextEncoder
from uvit_ldm.configuration import UViTConfig
from uvit_ldm.feature_files import read_prompts
from uvit_ldm.features import open_features

from .commands import LAUNCH, REPOSITORY, Command, environment
from .forks import run, run_all

EXTRACT_COCO = str(REPOSITORY / "extract_coco_features.py")
CONFIG = UViTConfig(8, 2, 4, 2, 2, 8, clip_dim=16, num_text_tokens=12)
COUNT = 11
# Captions of each image, in turns.
CAPTIONS = ["the digit three", "a photo of 12 cats", "the the the", "a dog!", "a very long caption that is cut off"]
COUNTS = [1 + i % 5 for i in range(COUNT)]
PROMPTS = ["the digit 3", "a cat"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with images and captions; in a copy one image is none."""
    folder, rng = tmp_path_factory.mktemp("extract_coco"), np.random.default_rng(0)
    (folder / "images").mkdir()
    ids = [900 - 7 * i for i in range(COUNT)]
    for number in ids:
        pixels = rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/COCO_{number:012}.jpg")
    images = [{"id": number, "file_name": f"COCO_{number:012}.jpg"} for number in ids]
    annotations = [
        {"image_id": number, "id": 10 * number + k, "caption": CAPTIONS[k]}
        for number, count in zip(sorted(ids), COUNTS, strict=True)
        for k in range(count)
    ]
    images.append({"id": 3, "file_name": "without_caption.jpg"})
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    elsewhere = [{"id": 1, "file_name": "../../etc/passwd"}]
    (folder / "hostile.json").write_text(json.dumps({"images": elsewhere, "annotations": []}))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    shutil.copytree(folder / "images", folder / "spoiled")
    (folder / f"spoiled/COCO_{sorted(ids)[2]:012}.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def extract(root, vae_folder, clip_folder):
    """`extract(target, *flags)`: the command."""

    def make(target: str, *flags: str, processes: int = 1, data: str = "images", captions: str = "captions.json"):
        launcher = (*LAUNCH, "--log_dir", f"{target}_log") if processes == 2 else ()
        own = ("--images-path", data, "--captions-file", captions, "--features-path", target, "--image-size", "64")
        own += ("--vae_name_or_path", str(vae_folder), "--text_encoder_name_or_path", str(clip_folder))
        own += ("--tokenizer_name_or_path", str(clip_folder), "--model_max_length", "12", "--batch-size", "2")
        return Command([*launcher, EXTRACT_COCO, *own, *flags], root)

    return make


@pytest.fixture(scope="module")
def results(root, extract):
    commands = {
        f"{layout}_{processes}": extract(
            f"{layout}_{processes}", "--layout", layout, "--prompts", "prompts.txt", processes=processes
        )
        for layout in ("files", "packed")
        for processes in (1, 2)
    }
    commands |= {
        f"skipped_{processes}": extract(
            f"skipped_{processes}", "--unreadable", "skip", processes=processes, data="spoiled"
        )
        for processes in (1, 2)
    }
    commands["stopped"] = extract("stopped", data="spoiled")
    commands["hostile"] = extract("hostile", captions="hostile.json")
    commands["long"] = extract("long", "--model_max_length", "77")
    return run_all(commands)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_two_processes_write_what_one_writes(root, results, layout):
    for processes in (1, 2):
        out = results[f"{layout}_{processes}"].ok().out
        assert f"encoded {COUNT} images and {sum(COUNTS)} captions, 0 and 0 were there already" in out
    found = content(root / f"{layout}_2")
    assert found == content(root / f"{layout}_1")
    others = 1 + len(PROMPTS)
    assert len(found) == others + (COUNT + sum(COUNTS) + 2 if layout == "files" else 6)


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_training_reads_images_captions_and_prompts(root, results, clip_folder, layout):
    results[f"{layout}_1"].ok()
    store = open_features(root / f"{layout}_1", CONFIG)
    assert store.captions.tolist() == COUNTS
    encoder = TextEncoder.load(str(clip_folder), str(clip_folder), 12)
    tolerance = 1e-4 if layout == "files" else 1e-2
    np.testing.assert_allclose(store._context(4, 2), encoder.encode([CAPTIONS[2]])[0], atol=tolerance)
    np.testing.assert_allclose(store.empty_context, encoder.encode([""])[0], atol=1e-4)
    prompts = read_prompts(root / f"{layout}_1", CONFIG.context_shape)
    assert [prompt for prompt, _ in prompts] == PROMPTS
    np.testing.assert_allclose(prompts[1][1], encoder.encode([PROMPTS[1]])[0], atol=1e-4)


def test_progress_has_a_rate_and_the_remaining_time(results):
    lines = results["packed_1"].ok().err.splitlines()
    for count, unit in ((COUNT, "image"), (sum(COUNTS), "caption")):
        assert any(
            line.startswith(f"extract: {count}/{count}, ") and f"{unit}/s" in line and "left" in line for line in lines
        )


@pytest.mark.parametrize("layout", ["files", "packed"])
def test_a_killed_extraction_continues_to_the_same_files(root, results, extract, layout):
    """Killed as soon as there is something of it, which is sooner or later at every run."""
    target = root / f"{layout}_killed"
    command = extract(target.name, "--layout", layout, "--batch-size", "1")
    run(extract(f"{layout}_whole", "--layout", layout, "--batch-size", "1")).ok()
    process = subprocess.Popen(
        [sys.executable, *command.arguments],
        cwd=command.folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and written(target, layout) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= written(target, layout) < sum(COUNTS)
    run(command).ok()
    assert content(target) == content(root / f"{layout}_whole")
    assert not list(target.rglob("*.partial"))


def written(target: Path, layout: str) -> int:
    """Contexts that are there."""
    if layout == "files":
        return len(list(target.glob("train/*_*.npy")))
    labels = target / "train/captions.partial/labels.npy"
    return int((np.load(labels) >= 0).sum()) if labels.exists() else 0


def test_an_unreadable_image_stops_or_is_skipped_by_choice(root, results):
    stopped = results["stopped"]
    assert stopped.code == 1
    assert stopped.err.splitlines()[-1].startswith("error: cannot read the image spoiled/COCO_")
    for processes in (1, 2):
        result = results[f"skipped_{processes}"].ok()
        assert "skipped: cannot read the image spoiled/COCO_" in result.out + result.err
        assert "note: 1 images were skipped" in result.out + result.err
        assert f"encoded {COUNT - 1} images" in result.out
    assert content(root / "skipped_1") == content(root / "skipped_2")
    assert open_features(root / "skipped_1", CONFIG).captions.tolist() == COUNTS[:2] + COUNTS[3:]


def test_bad_input_ends_with_one_line(root, results):
    hostile = results["hostile"]
    assert hostile.code == 1 and hostile.err == (
        "error: hostile.json names the image '../../etc/passwd', which is no path below the folder of images\n"
    )
    long = results["long"]
    assert long.code == 1 and long.err.startswith("error: ") and long.err.count("\n") == 1
    assert not (root / "hostile").exists() and not (root / "long").exists()
