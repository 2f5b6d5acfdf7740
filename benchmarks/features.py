"""Measures both feature layouts on the device at hand: extraction, and their size; `loading.py` measures reading them.

Images and the VAE's weights are random: they do not change the time.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import (  # noqa: E402
    STABLE_DIFFUSION_CHANNELS,
    feature_contents,
    random_vae,
    scratch,
    write_images,
)
from benchmarks.report import Table, write  # noqa: E402
from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402

IMAGENET = 1_281_167

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
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    print(runtime.start(), flush=True)
    from latent_diffusion import device

    place = device.select(arguments.device)
    print(f"on a {place}, {os.cpu_count()} CPU cores, {arguments.image_size}x{arguments.image_size} pixels")
    with scratch() as folder:
        extraction = measure_extraction(Path(folder), place, arguments.image_size, arguments.images)
    write("features", {"tables": [extraction.content(), tabulate_sizes(arguments.image_size).content()]})


def measure_extraction(folder: Path, place: str, image_size: int, count: int) -> Table:
    """Images a second from JPEG files to either layout, each image and its mirror."""
    from dit.extraction import ExtractionSettings, extract_features

    write_images(folder / "images", count)
    vae = random_vae(VAE_CHANNELS[place])
    title = f"extraction: {count} images, a random VAE of {VAE_CHANNELS[place]} channels, batches of {BATCH_SIZE}"
    if place == "cpu":
        title += "\n(a narrow VAE, taken because this is a CPU; Stable Diffusion's has 128 to 512 channels)"
    table = Table("extraction", title, ("layout", "images/s"), {"images/s": ".1f"})
    extract_features(folder / "images", folder / "warm-up", ExtractionSettings("random", image_size), vae, BATCH_SIZE)
    for layout in ("files", "packed"):
        settings = ExtractionSettings("random", image_size, layout, flip=True)
        start = time.perf_counter()
        extract_features(folder / "images", folder / layout, settings, vae, BATCH_SIZE)
        table.row(layout, count / (time.perf_counter() - start))
    return table


def tabulate_sizes(image_size: int) -> Table:
    """What the layouts take, computed: an image's share, and ImageNet's train set."""
    from latent_diffusion.packed import RECORDS_PER_SHARD

    contents = feature_contents(image_size, IMAGENET)
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
    title = f"size, computed: {IMAGENET:,} images; on disk with blocks of {BLOCK} bytes; files with manifests"
    columns = ("layout                  ", "bytes an image", "GB   ", "GB on disk", "files    ")
    table = Table("sizes", title, columns, {"GB": ".1f", "GB on disk": ".1f"})
    for name, (size, disk, files) in rows.items():
        table.row(name, size, *(IMAGENET * value / 1e9 for value in (size, disk)), files)
    return table


def on_disk(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


if __name__ == "__main__":
    main()
