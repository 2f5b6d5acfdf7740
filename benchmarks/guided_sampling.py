"""Measures sampling with guidance (DDIM, scale 4) of this project beside ppdiffusers and diffusers, noise to images.

Each contestant is a program of its own in benchmarks/peers, run once per round, in turn. All read the same random
weights and draw a whole batch with one call, as a user does, decoding included: with a VAE so narrow that it hardly
counts. Stock ppdiffusers runs without this project's runtime settings, but with a thread for every core. Peak memory is
that of sampling: what loading took before is left out.
"""

import argparse
import os
import sys
from collections.abc import Mapping
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
from benchmarks.flops import forward_flops  # noqa: E402
from benchmarks.measure import random_vae, scratch  # noqa: E402
from benchmarks.peak import Peak, matrix_peak  # noqa: E402
from benchmarks.report import Table  # noqa: E402
from dit.configuration import DiTConfig  # noqa: E402
from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser, at_least  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402

OURS, PPDIFFUSERS, DIFFUSERS = "this project", "ppdiffusers", "diffusers"
COMPILED = f"{DIFFUSERS}, compiled"

# What this project's time may be at most, over diffusers'.
TARGET = 0.9

# Channels of the blocks of the VAE; Stable Diffusion's has 128 to 512.
VAE_CHANNELS = (4, 4, 4, 4)

COLUMNS = (
    "contestant".ljust(len(COMPILED)),
    "s/image",
    "s/step",
    "min   ",
    "max   ",
    "over diffusers",
    "of peak",
    "peak memory, GiB",
)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="DiT-B/2", help="published name or JSON file (default: DiT-B/2)")
    add("--batch-size", type=at_least(1), default=4, help="images that are drawn together (default: 4)")
    add("--steps", type=at_least(1), default=25, help="of DDIM (default: 25)")
    add("--rounds", type=at_least(1), default=2, help="runs of each contestant (default: 2)")
    add("--repeats", type=at_least(1), default=1, help="batches of a run that are timed (default: 1)")
    add("--device", choices=["cpu", "gpu"], help="without it the GPU if there is one")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    config = DiTConfig.from_name_or_file(arguments.model)
    peer = peer_python()
    peak = matrix_peak(arguments.device, peer)
    print(peak, flush=True)
    with scratch() as folder:
        write_pipelines(Path(folder), config)
        entries = contestants(Path(folder), arguments, peak.place, peer)
        results = compete(entries, arguments.rounds, Progress(arguments.rounds * len(entries)))
    tabulate(results, arguments, config, peak)
    raise_failures(results.values())


def write_pipelines(folder: Path, config: DiTConfig) -> None:
    """The same random weights as a pipeline of each library: `folder/ppdiffusers` and `folder/diffusers`."""
    runtime.start()
    from dit.export import export_pipeline
    from dit.modeling import DiT

    random_vae(VAE_CHANNELS).save_pretrained(str(folder / "vae"), safe_serialization=False)
    model = DiT(config)
    model.eval()
    for library in (PPDIFFUSERS, DIFFUSERS):
        export_pipeline(model, str(folder / "vae"), folder / library, None, library=library)


def contestants(folder: Path, arguments: argparse.Namespace, place: str, peer: Path | None) -> list[Contestant]:
    """Who draws; those in PyTorch only where there is an interpreter that has it."""
    flags = ["--batch-size", arguments.batch_size, "--steps", arguments.steps, "--repeats", arguments.repeats]
    flags += ["--device", place]
    ours, stock = ([sys.executable, PEERS / f"{name}_sampling.py"] for name in ("ours", PPDIFFUSERS))
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}  # Paddle's default is one
    found = [
        Contestant(OURS, [*ours, folder / PPDIFFUSERS, *flags]),
        Contestant(PPDIFFUSERS, [*stock, folder / PPDIFFUSERS, *flags], threads),
    ]
    if peer:
        program = [peer, PEERS / "diffusers_sampling.py", folder / DIFFUSERS, *flags]
        found += [Contestant(DIFFUSERS, program), Contestant(COMPILED, [*program, "--compiled"])]
    return found


def tabulate(results: Mapping[str, Result], arguments: argparse.Namespace, config: DiTConfig, peak: Peak) -> None:
    # Guidance computes every image twice.
    flops = 2 * arguments.batch_size * arguments.steps * forward_flops(config)
    title = (
        f"{arguments.model} at {config.resolution} pixels, {arguments.batch_size} images, {arguments.steps} steps of "
        f"DDIM with guidance, {flops / 1e9:.0f} GFLOP; min and max are of s/image"
    )

    table = Table("guided-sampling", title, COLUMNS, {"of peak": ".0%"})
    rival = results.get(DIFFUSERS)
    reference = rival if rival and not rival.failure else None
    for result in results.values():
        if result.failure:
            table.failed(result.name, result.failure)
            continue
        table.row(
            result.name,
            result.median / arguments.batch_size,
            result.median / arguments.steps,
            result.min / arguments.batch_size,
            result.max / arguments.batch_size,
            result.median / reference.median if reference else None,
            peak.share(flops, result.median),
            result.peak_memory / 2**30,
        )
    own = results[OURS]
    ratio = own.median / reference.median if reference and not own.failure else None
    if ratio:
        outcome = "met" if ratio <= TARGET else "missed"
        print(f"\n{OURS} over {DIFFUSERS}: {ratio:.3f}, at most {TARGET}: {outcome}")
    table.write(
        peak=peak.rates,
        target={"over diffusers": ratio, "at most": TARGET},
        runs={result.name: result.runs for result in results.values()},
    )


if __name__ == "__main__":
    main()
