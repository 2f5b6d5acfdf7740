"""Measures both feature layouts on the device at hand: extraction, loading for training, and their size.

Images, features and the VAE's weights are random: they do not change the time.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import (  # noqa: E402
    STABLE_DIFFUSION_CHANNELS,
    print_head,
    print_row,
    random_vae,
    scratch,
    write_images,
)
from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402

IMAGENET, CLASSES = 1_281_167, 1000

# What a file takes on most disks is a multiple of this.
BLOCK = 4096

# Channels of the blocks of the VAE: on a GPU those of Stable Diffusion's.
VAE_CHANNELS = {"cpu": (8, 8, 8, 8), "gpu": STABLE_DIFFUSION_CHANNELS}
BATCH_SIZE = 16


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "gpu"], help="without it the GPU if there is one")
    add("--image-size", type=int, default=256, help="side of the images in pixels")
    add("--images", type=int, default=64, help="images to extract")
    add("--features", type=int, default=4096, help="images whose features are loaded")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    print(runtime.start(), flush=True)
    from latent_diffusion import device

    place = device.select(arguments.device)
    print(f"on a {place}, {os.cpu_count()} CPU cores, {arguments.image_size}x{arguments.image_size} pixels")
    with scratch() as folder:
        measure_extraction(Path(folder), place, arguments.image_size, arguments.images)
    with scratch() as folder:
        measure_loading(Path(folder), arguments.image_size, arguments.features)
    print_sizes(arguments.image_size)


def measure_extraction(folder: Path, place: str, image_size: int, count: int) -> None:
    """Images a second from JPEG files to either layout, each image and its mirror."""
    from dit.extraction import ExtractionSettings, extract_features

    write_images(folder / "images", count)
    vae = random_vae(VAE_CHANNELS[place])
    print(f"\nextraction: {count} images, a random VAE of {VAE_CHANNELS[place]} channels, batches of {BATCH_SIZE}")
    if place == "cpu":
        print("(a narrow VAE, taken because this is a CPU; Stable Diffusion's has 128 to 512 channels)")
    widths = print_head("layout", "images/s")
    extract_features(folder / "images", folder / "warm-up", ExtractionSettings("random", image_size), vae, BATCH_SIZE)
    for layout in ("files", "packed"):
        settings = ExtractionSettings("random", image_size, layout, flip=True)
        start = time.perf_counter()
        extract_features(folder / "images", folder / layout, settings, vae, BATCH_SIZE)
        print_row(layout, f"{count / (time.perf_counter() - start):.1f}", widths=widths)


def measure_loading(folder: Path, image_size: int, count: int) -> None:
    """Samples a second as training reads them: shuffled, with timestep and noise."""
    from dit.configuration import DiTConfig
    from dit.features import open_features
    from dit.objective import make_objective
    from latent_diffusion.features import TrainingStream

    print(
        f"\nloading: features of {count} images, batches of {BATCH_SIZE}; cold: just dropped from the system's cache, "
        "as far as it lets go of them (a disk may have another)"
    )
    widths = print_head("layout", "workers", "cold samples/s", "warm samples/s")
    config = DiTConfig.from_name("DiT-XL/2", image_size)
    for layout, writer in writers(folder, image_size, count).items():
        write_random(writer, count)
        store = open_features(folder / layout, config, use_flip=True)
        stream = TrainingStream(store, make_objective(), seed=0)
        for workers in (0, 2):
            drop_from_cache(folder / layout)
            rates = [load(stream, workers, count) for _ in range(2)]
            print_row(layout, workers, *(f"{rate:.0f}" for rate in rates), widths=widths)


def writers(folder: Path, image_size: int, count: int) -> dict:
    """A writer of each layout, with the types and views that extraction gives it."""
    from dit.feature_files import FeatureFilesWriter
    from latent_diffusion.packed import PackedWriter

    contents = layouts(image_size, count)
    return {
        "files": FeatureFilesWriter(folder / "files", contents["files"]),
        "packed": PackedWriter(folder / "packed", contents["packed"]),
    }


def layouts(image_size: int, count: int) -> dict:
    """What extraction writes in each layout, mirrored images included."""
    from latent_diffusion.records import LATENTS, MOMENTS, ImageContents

    side = image_size // 8
    return {
        "files": ImageContents(LATENTS, (2, 4, side, side), "float32", count, image_size, 0.18215),
        "packed": ImageContents(MOMENTS, (2, 8, side, side), "float16", count, image_size, 0.18215),
    }


def write_random(writer, count: int) -> None:
    import numpy as np

    writer.claim()
    rng = np.random.default_rng(0)
    for start in range(0, count, 256):
        numbers = range(start, min(start + 256, count))
        values = rng.standard_normal((len(numbers), *writer.contents.record_shape), dtype=np.float32)
        writer.write(numbers, values, [number % CLASSES for number in numbers])
    writer.finish([])


def drop_from_cache(folder: Path) -> None:
    os.sync()  # what is not on the disk yet stays
    for path in folder.rglob("*.npy"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(stream, workers: int, count: int) -> float:
    from latent_diffusion.features import StreamBatchSampler, TrainingLoader

    batches = count // BATCH_SIZE
    loader = iter(TrainingLoader(stream, StreamBatchSampler(BATCH_SIZE, 0, batches), workers))
    next(loader)  # workers have started
    start = time.perf_counter()
    for _ in loader:
        pass
    return (batches - 1) * BATCH_SIZE / (time.perf_counter() - start)


def print_sizes(image_size: int) -> None:
    """What the layouts take, computed: an image's share, and ImageNet's train set."""
    from latent_diffusion.packed import RECORDS_PER_SHARD

    contents = layouts(image_size, IMAGENET)
    header, label = 128, 8
    latent_file = header + contents["files"].record_bytes // 2
    packed_image = contents["packed"].record_bytes + label
    packed_files = -(-IMAGENET // RECORDS_PER_SHARD) + 2
    rows = {
        "files, float32, mirrored": (
            2 * latent_file + header + label,
            2 * on_disk(latent_file) + BLOCK,
            3 * IMAGENET + 1,
        ),
        "packed, float16": (packed_image, packed_image, packed_files),
    }
    print(f"\nsize, computed: {IMAGENET:,} images; on disk with blocks of {BLOCK} bytes; files with manifests")
    widths = print_head("layout                  ", "bytes an image", "GB ", "GB on disk", "files    ")
    for name, (size, disk, files) in rows.items():
        gigabytes = (f"{IMAGENET * value / 1e9:.1f}" for value in (size, disk))
        print_row(name, f"{size:,}", *gigabytes, f"{files:,}", widths=widths)


def on_disk(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


if __name__ == "__main__":
    main()
