"""Extraction and conversion: by one process and two, killed in the middle, and training on what they write."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .commands import EXTRACT, LAUNCH, REPOSITORY, Command
from .forks import run, run_all

CONVERT_FEATURES = str(REPOSITORY / "scripts" / "convert_features.py")
LAYOUTS = {"files": ("--use_flip", "True"), "packed": ("--layout", "packed", "--use_flip", "False")}
COUNT = 23


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with images of ten classes; one image is none."""
    folder, rng = tmp_path_factory.mktemp("extract"), np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / f"images/{i % 10}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 64, 3), dtype=np.uint8)).save(path)
    shutil.copytree(folder / "images", folder / "spoiled")
    (folder / "spoiled/3/13.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def extract(root, vae_folder):
    """`extract(target, *flags)`: the command."""

    def make(target: str, *flags: str, processes: int = 1, data: str = "images") -> Command:
        launcher = (*LAUNCH, "--log_dir", f"{target}_log") if processes == 2 else ()
        own = ("--data-path", data, "--features-path", target, "--image-size", "64", "--vae", str(vae_folder))
        return Command([*launcher, EXTRACT, *own, "--batch-size", "2", *flags], root)

    return make


@pytest.fixture(scope="module")
def results(root, extract):
    commands = {
        f"{layout}_{processes}": extract(f"{layout}_{processes}", *flags, processes=processes)
        for layout, flags in LAYOUTS.items()
        for processes in (1, 2)
    }
    skip = ("--unreadable", "skip", "--layout", "packed")
    commands["skipped_2"] = extract("skipped_2", *skip, processes=2, data="spoiled")
    commands["skipped_1"] = extract("skipped_1", *skip, data="spoiled")
    commands["in a file"] = extract("images/3/13.png")
    commands["stopped"] = extract("stopped", "--layout", "packed", data="spoiled")
    return run_all(commands)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_write_what_one_writes(root, results, layout):
    for processes in (1, 2):
        assert f"encoded {COUNT} images, 0 were there already" in results[f"{layout}_{processes}"].ok().out
    found = content(root / f"{layout}_2")
    assert found == content(root / f"{layout}_1")
    assert len(found) == (3 * COUNT + 1 if layout == "files" else 3)


def test_progress_has_a_rate_and_the_remaining_time(results):
    lines = results["packed_1"].ok().err.splitlines()
    assert any(
        line.startswith(f"extract: {COUNT}/{COUNT}, ") and "image/s" in line and "left" in line for line in lines
    )
    share = "extract (share of one process of 2): 12/12"
    launched = results["packed_2"].ok()
    assert share in launched.out + launched.err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_extraction_continues_to_the_same_files(root, results, extract, layout):
    """Killed as soon as there is something of it, which is sooner or later at every run."""
    target = root / f"{layout}_killed"
    command = extract(target.name, *LAYOUTS[layout], "--batch-size", "1")
    whole = run(extract(f"{layout}_whole", *LAYOUTS[layout], "--batch-size", "1")).ok()
    process = subprocess.Popen(
        [sys.executable, *command.arguments],
        cwd=command.folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and written(target, layout) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert whole.code == 0 and 3 <= written(target, layout) < COUNT
    run(command).ok()
    assert content(target) == content(root / f"{layout}_whole")
    assert not target.with_name(f"{target.name}.partial").exists()


def written(target: Path, layout: str) -> int:
    if layout == "files":
        return len(list((target / "imagenet64_labels").glob("*.npy")))
    labels = target.with_name(f"{target.name}.partial") / "labels.npy"
    return int((np.load(labels) >= 0).sum()) if labels.exists() else 0


def test_an_unreadable_image_stops_or_is_skipped_by_choice(root, results):
    stopped = results["stopped"]
    assert stopped.code == 1 and stopped.err.splitlines()[-1].startswith(
        "error: cannot read the image spoiled/3/13.png"
    )
    assert not (root / "stopped").exists()
    result = results["skipped_1"].ok()
    assert "skipped: cannot read the image spoiled/3/13.png" in result.err
    assert "note: 1 images were skipped" in result.err and f"encoded {COUNT - 1} images" in result.out
    launched = results["skipped_2"].ok()
    assert "note: 1 images were skipped" in launched.out + launched.err
    assert content(root / "skipped_1") == content(root / "skipped_2")


def test_features_in_a_file_end_with_one_line(results):
    result = results["in a file"]
    assert result.code == 1 and result.err == (
        "error: cannot make or write into the folder images/3/13.png (File exists); choose another folder\n"
    )


def test_training_takes_packed_features_and_conversion_gives_them_back(root, results, train_command):
    for name in ("packed_1", "files_1"):
        results[name].ok()
    steps = ("--per_device_train_batch_size", 8, "--max_steps", 3, "--save_steps", 100)
    trained = run(train_command(root / "training", *steps, "--feature_path", root / "packed_1")).ok()
    assert f"{COUNT} images, 3 steps" in trained.out
    losses = [float(loss) for loss in trained.logged("loss")]
    assert len(losses) == 3 and np.isfinite(losses).all()

    there = run(Command([CONVERT_FEATURES, "files_1", "converted"], root)).ok()
    assert f"wrote converted: {COUNT} images of 64 pixels, 2 views each, float32 latents" in there.out
    run(Command([CONVERT_FEATURES, "converted", "back", "--layout", "files"], root)).ok()
    assert content(root / "back") == content(root / "files_1")
    drawn = run(Command([CONVERT_FEATURES, "packed_1", "drawn", "--layout", "files", "--seed", "3"], root)).ok()
    assert "one sample of each posterior, drawn by seed 3" in drawn.out
    assert "sample of each posterior" not in there.out
