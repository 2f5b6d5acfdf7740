"""Measures how fast features are read for training, beside fast-DiT's way, and how long opening a folder takes.

Each contestant is a program of its own in benchmarks/peers, run once per round, in turn. fast-DiT's way: both folders
listed and sorted, two `np.load` a sample, in PyTorch's DataLoader. Its samples are latents and labels, so packed
latents are read for comparison ("reading alone"): the same numbers to tensors, shuffled, with nothing else drawn; also
in float16, the packed layout's own type. What trainers read also draws mirror, posterior, label dropout, timestep and
noise of each sample, in the loader.

Features are random. Cold: just dropped from the system's cache, as far as it lets go of them (a disk may have another).
"""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contest import (  # noqa: E402
    PEERS,
    Contestant,
    Progress,
    Result,
    compete,
    peer_python,
    raise_failures,
)
from benchmarks.flops import TRAINING, forward_flops  # noqa: E402
from benchmarks.measure import feature_contents, scratch, write_random  # noqa: E402
from benchmarks.peak import Peak, matrix_peak  # noqa: E402
from benchmarks.report import Table, write  # noqa: E402
from dit.configuration import DiTConfig  # noqa: E402
from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser, at_least  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402

# What reading packed latents is to be at least, over fast-DiT's way.
TARGET = 20

MODEL = "DiT-S/2"
WORKERS = (0, 2)
FILES, PACKED, PACKED_LATENTS, PACKED_FLOAT16 = "files", "packed", "packed-latents", "packed-latents-float16"
READING, READING_FLOAT16 = "packed latents, reading alone", "packed latents in float16, reading alone"
FAST_DIT, FAST_DIT_NUMPY = "fast-DiT's way", "fast-DiT's way, without PyTorch"

# Folders of the table of opening hold features of images of this side: what is in the files does not matter there.
SMALL = 64
# ext4 allows 65,000 hard links to a file.
LINKS_PER_FILE = 10_000


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image-size", type=at_least(8), default=256, help="side of the images in pixels (default: 256)")
    add("--features", type=at_least(32), default=4096, help="images whose features are read (default: 4096)")
    add("--items", type=at_least(1), default=100_000, help="images in the folders that are opened (default: 100000)")
    add("--rounds", type=at_least(1), default=3, help="runs of each contestant (default: 3)")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    peer = peer_python()
    peak = matrix_peak("cpu", peer)
    runtime.start()
    with scratch() as folder:
        reading = measure_reading(Path(folder), arguments, peer)
        reading_table = tabulate_reading(reading, arguments, peak)
    with scratch() as folder:
        opening = measure_opening(Path(folder), arguments, peer)
        opening_table = tabulate_opening(opening, arguments.items)
    results = reading | opening
    report = {"peak": peak.rates, "tables": [reading_table.content(), opening_table.content()]}
    write("loading", report | {"runs": {name: result.runs for name, result in results.items()}})
    raise_failures(results.values())


def measure_reading(folder: Path, arguments: argparse.Namespace, peer: Path | None) -> dict[str, Result]:
    from dit.feature_files import FeatureFilesWriter
    from latent_diffusion.packed import PackedWriter

    contents = feature_contents(arguments.image_size, arguments.features)
    write_random(FeatureFilesWriter(folder / FILES, contents["files"]))
    write_random(PackedWriter(folder / PACKED, contents["packed"]))
    latents = replace(contents["files"], record_shape=(1, *contents["files"].record_shape[1:]))
    write_random(PackedWriter(folder / PACKED_LATENTS, latents))
    write_random(PackedWriter(folder / PACKED_FLOAT16, replace(latents, dtype="float16")))
    entries = reading_contestants(folder, arguments.image_size, peer)
    return compete(entries, arguments.rounds, Progress(arguments.rounds * len(entries)))


def reading_contestants(folder: Path, size: int, peer: Path | None) -> list[Contestant]:
    ours = [sys.executable, PEERS / "ours_loading.py"]
    theirs = PEERS / "fast_dit_loading.py"
    entries = [
        Contestant(READING, [*ours, "reading", folder / PACKED_LATENTS, size]),
        Contestant(READING_FLOAT16, [*ours, "reading", folder / PACKED_FLOAT16, size]),
    ]
    entries.append(Contestant("packed moments, reading alone", [*ours, "reading", folder / PACKED, size]))
    entries += [
        Contestant(f"{layout}, for training, {workers} workers", [*ours, "training", folder / layout, size, *flags])
        for layout in (PACKED, FILES)
        for workers, flags in worker_flags()
    ]
    if peer:
        entries += [
            Contestant(f"{FAST_DIT}, {workers} workers", [peer, theirs, "torch", folder / FILES, size, *flags])
            for workers, flags in worker_flags()
        ]
    return [*entries, Contestant(FAST_DIT_NUMPY, [sys.executable, theirs, "numpy", folder / FILES, size])]


def worker_flags() -> list[tuple[int, list[object]]]:
    return [(workers, ["--workers", workers]) for workers in WORKERS]


def tabulate_reading(results: Mapping[str, Result], arguments: argparse.Namespace, peak: Peak) -> Table:
    rival = next((name for name in (f"{FAST_DIT}, 0 workers", FAST_DIT_NUMPY) if is_measured(results.get(name))), None)
    columns = ("contestant".ljust(max(map(len, results))), "cold samples/s", "warm samples/s")
    columns += tuple(f"{kind}, over {rival}" for kind in ("cold", "warm")) if rival else ()
    title = f"Reading features of {arguments.features:,} images of {arguments.image_size} pixels, batches of 16"
    table = Table("reading", title, columns, dict.fromkeys(columns[1:3], ",.0f"))
    for result in results.values():
        if not is_measured(result):
            table.failed(result.name, result.failure)
            continue
        rates = rates_of(result)
        ratios = [own / other for own, other in zip(rates, rates_of(results[rival]), strict=True)] if rival else []
        table.row(result.name, *rates, *ratios)
    needed = peak.flops / (TRAINING * forward_flops(DiTConfig.from_name(MODEL, arguments.image_size)))
    print(f"\ntraining {MODEL} at the whole matrix-product peak of this machine would take {needed:.1f} samples/s")
    for name in (READING, READING_FLOAT16, f"{PACKED}, for training, 0 workers"):
        if rival and is_measured(results.get(name)):
            ratio = rates_of(results[name])[1] / rates_of(results[rival])[1]
            outcome = "met" if ratio >= TARGET else "missed"
            print(f"{name}, over {rival}, warm: {ratio:.1f}, at least {TARGET}: {outcome}")
    return table


def is_measured(result: Result | None) -> bool:
    return result is not None and not result.failure


def rates_of(result: Result) -> tuple[float, float]:
    """Samples a second, cold and warm."""
    return 1 / result.figure("cold"), 1 / result.median


def measure_opening(folder: Path, arguments: argparse.Namespace, peer: Path | None) -> dict[str, Result]:
    write_linked(folder / FILES, arguments.items)
    from latent_diffusion.packed import PackedWriter

    write_random(PackedWriter(folder / PACKED, feature_contents(SMALL, arguments.items)["packed"]))
    ours = [sys.executable, PEERS / "ours_loading.py", "open"]
    theirs = [peer or sys.executable, PEERS / "fast_dit_loading.py", "open"]
    entries = [
        Contestant("opening: packed", [*ours, folder / PACKED, SMALL]),
        Contestant("opening: files, all names compared", [*ours, folder / FILES, SMALL]),
        Contestant("opening: fast-DiT's way", [*theirs, folder / FILES, SMALL]),
    ]
    return compete(entries, arguments.rounds, Progress(arguments.rounds * len(entries)))


def write_linked(folder: Path, count: int) -> None:
    """The fastdit layout with few files under many names."""
    from dit.feature_files import FeatureFilesWriter, feature_folders

    originals = -(-count // LINKS_PER_FILE)
    contents = feature_contents(SMALL, originals)["files"]
    contents = replace(contents, record_shape=(1, *contents.record_shape[1:]))
    write_random(FeatureFilesWriter(folder, contents))
    for path in feature_folders(folder, SMALL)[:2]:
        for number in range(originals, count):
            os.link(path / f"{number % originals}.npy", path / f"{number}.npy")


def tabulate_opening(results: Mapping[str, Result], items: int) -> Table:
    columns = ("contestant".ljust(max(map(len, results))), "seconds", "min   ", "max   ", "once more")
    table = Table("opening", f"Opening a folder of {items:,} images; imports left out", columns)
    for result in results.values():
        if is_measured(result):
            table.row(result.name, result.median, result.min, result.max, result.figure("again"))
        else:
            table.failed(result.name, result.failure)
    return table


if __name__ == "__main__":
    main()
