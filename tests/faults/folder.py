"""Opening feature folders of a million images: the seconds and the memory that it takes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dit.features import open_features as open_dit_features
from latent_diffusion.packed import PackedWriter
from tests.cli.commands import REPOSITORY
from uvit_ldm.features import open_features as open_coco_features

from .data_layouts import DIT, RESOLUTION, UVIT, image_contents
from .memory import forget_peak, memory

IMAGES = 1_000_000
# Names of one file; ext4 allows 65,000.
LINKS = 50_000
# What opening may take: minutes would be noticed on a busy machine, too.
MOST_SECONDS, FIXED_MB, MB_OF_A_MILLION = 120, 30, 350

# Captions of an image, as COCO has them.
CAPTIONS = 5

# Opens folders, each in a process of its own, and prints a line of figures for each.
OPEN = """
import sys
from latent_diffusion import runtime
runtime.start()
from tests.faults.folder import measure_opening
for folder in sys.argv[1:]:
    measure_opening(folder)
"""


def run(folder: Path, scale: float) -> dict[str, int | float | str]:
    """Opens folders of `scale` times a million images.

    Args:
        folder: for them; empty.
        scale: 1 for a million.

    Returns:
        Images, seconds of opening, and MiB that opening takes at its peak and keeps, of each layout.

    Raises:
        AssertionError: a folder cannot be opened, not all images are found, or it takes too long or too much memory.
    """
    images = max(1, int(scale * IMAGES))
    figures: dict[str, int | float | str] = {"images": images}
    for name, (_, write) in LAYOUTS.items():
        print(f"folder: makes {images:,} images, {name}", flush=True)
        (folder / name).mkdir()
        write(folder / name, images)
    folders = [folder / name for name in LAYOUTS]
    done = subprocess.run([sys.executable, "-c", OPEN, *folders], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, f"a folder cannot be opened: {done.stderr[-2000:]}"
    for name, line in zip(LAYOUTS, done.stdout.splitlines()[-len(LAYOUTS) :], strict=True):
        opened = json.loads(line)
        assert opened.pop("images") == images, f"of the {images} images others were found, {name}"
        assert opened["seconds"] < MOST_SECONDS, f"opening took {opened['seconds']:.0f} s, {name}"
        limit = FIXED_MB + MB_OF_A_MILLION * images / IMAGES
        assert opened["peak_mb"] < limit, f"opening took {opened['peak_mb']:.0f} MiB, {name}"
        figures |= {f"{name}, {key}": round(value, 2) for key, value in opened.items()}
    print(f"folder: {figures}", flush=True)
    return figures


def measure_opening(folder: str) -> None:
    """Prints the images of a folder, the seconds of opening it, and the MiB at the peak and afterwards."""
    open_store, _ = LAYOUTS[Path(folder).name]
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        return
    before, start = forget_peak(), time.perf_counter()
    store = open_store(Path(folder))
    seconds = time.perf_counter() - start
    taken = {"peak_mb": memory("VmHWM") - before, "kept_mb": memory("VmRSS") - before}
    figures = {"images": len(store), "seconds": seconds} | {key: value / 2**20 for key, value in taken.items()}
    print(json.dumps(figures), flush=True)
    os._exit(0)


class Links:
    """Names of few files with one content."""

    def __init__(self, folder: Path, content: np.ndarray):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.content, self.count = folder, content, 0

    def add(self, name: str) -> None:
        """Gives the content one more name."""
        if self.count % LINKS == 0:
            self.file = self.folder / name
            np.save(self.file, self.content)
        else:
            os.link(self.file, self.folder / name)
        self.count += 1


def write_dit_files(folder: Path, images: int) -> None:
    latents = Links(folder / f"imagenet{RESOLUTION}_features", np.zeros((1, 4, 8, 8), np.float32))
    labels = Links(folder / f"imagenet{RESOLUTION}_labels", np.array([1]))
    for image in range(images):
        latents.add(f"{image}.npy")
        labels.add(f"{image}.npy")


def write_uvit_files(folder: Path, images: int) -> None:
    moments = Links(folder / "train", np.zeros((8, 8, 8), np.float32))
    contexts = Links(folder / "train", np.zeros(UVIT.context_shape, np.float32))
    np.save(folder / "empty_context.npy", np.zeros(UVIT.context_shape, np.float32))
    for image in range(images):
        moments.add(f"{image}.npy")
        for caption in range(CAPTIONS):
            contexts.add(f"{image}_{caption}.npy")


def write_dit_packed(folder: Path, images: int) -> None:
    """Records of zeros, which take no space on the disk."""
    contents = image_contents("moments", 2)
    writer = PackedWriter(folder, type(contents)(**(vars(contents) | {"records": images})))
    writer.claim()
    np.lib.format.open_memmap(writer.labels, "r+")[:] = 1
    writer.finish([])


# How a folder of each layout is opened, and written.
LAYOUTS = {
    "DiT files": (lambda folder: open_dit_features(folder, DIT), write_dit_files),
    "DiT packed": (lambda folder: open_dit_features(folder, DIT), write_dit_packed),
    "U-ViT files": (lambda folder: open_coco_features(folder, UVIT), write_uvit_files),
}
