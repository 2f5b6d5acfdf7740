"""Measures saving and loading weights and updating the EMA, on a CPU, beside PyTorch.

Each contestant is a program of its own in benchmarks/peers, run once per round, in turn, with the same network and
random weights. Loading reads a file that was just written, from the system's cache. This project checks each file that
it reads and runs no code from it. Saving ends when the file is on the disk: this project waits for that by itself,
after `torch.save` the file is flushed.
"""

import argparse
import json
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
from benchmarks.report import Table, write  # noqa: E402
from dit.configuration import DiTConfig  # noqa: E402
from latent_diffusion.command_line import ArgumentParser, at_least  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402

OURS, PYTORCH = "this project", "PyTorch"

# What the EMA's seconds are given for.
PARAMETERS = 100_000_000


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="DiT-B/4", help="published name or JSON file (default: DiT-B/4, 130 M parameters)")
    add("--rounds", type=at_least(1), default=3, help="runs of each contestant (default: 3)")
    add("--repeats", type=at_least(1), default=3, help="how often a run does each (default: 3)")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    config = json.dumps(DiTConfig.from_name_or_file(arguments.model).to_dict())
    flags = [config, "--repeats", arguments.repeats]
    entries = [Contestant(OURS, [sys.executable, PEERS / "ours_checkpoint.py", *flags])]
    if peer := peer_python():
        entries.append(Contestant(PYTORCH, [peer, PEERS / "torch_checkpoint.py", *flags]))
    results = compete(entries, arguments.rounds, Progress(arguments.rounds * len(entries)))
    tables = [tabulate_files(results, arguments.model), tabulate_ema(results)]
    runs = {name: result.runs for name, result in results.items()}
    write("checkpoints", {"tables": [table.content() for table in tables], "runs": runs})
    raise_failures(results.values())


def tabulate_files(results: Mapping[str, Result], model: str) -> Table:
    columns = ("contestant  ", "MB   ", "save, s", "save, MB/s", "load, s", "load, MB/s")
    formats = {"MB": ".0f", "save, MB/s": ".0f", "load, MB/s": ".0f"}
    table = Table("files", f"Weights of {model} to and from one file", columns, formats)
    for result in results.values():
        if result.failure:
            table.failed(result.name, result.failure)
            continue
        megabytes, load = result.figure("bytes") / 1e6, result.figure("load")
        save = result.median
        table.row(result.name, megabytes, save, megabytes / save, load, megabytes / load)
    return table


def tabulate_ema(results: Mapping[str, Result]) -> Table:
    """Of contestants that failed, the table before says why."""
    rows = {
        "this project": (OURS, "ema"),
        "PyTorch, _foreach_lerp_": (PYTORCH, "ema"),
        "PyTorch, fast-DiT's loop": (PYTORCH, "ema_loop"),
    }
    columns = ("contestant".ljust(max(map(len, rows))), "s for 100 M parameters", "GB/s")
    table = Table("ema", "Update of the EMA; 12 bytes a parameter are read or written", columns)
    for row, (name, figure) in rows.items():
        result = results.get(name)
        if result and not result.failure:
            seconds = result.figure(figure) / result.figure("parameters") * PARAMETERS
            table.row(row, seconds, 12 * PARAMETERS / seconds / 1e9)
    return table


if __name__ == "__main__":
    main()
