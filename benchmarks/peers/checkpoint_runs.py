"""The flags that the programs of checkpoints share, and what is measured. Standard library only."""

import argparse
import json
import os
from pathlib import Path

from timing import print_figures, seconds


def parse(description):
    """The flags common to all."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", type=json.loads, help="of a DiT, JSON")
    add("--repeats", type=int, required=True, help="how often each is timed")
    return parser.parse_args()


def measure(arguments, file, parameters, save, load, ema_updates):
    """Prints seconds of saving a file of weights to the disk, of loading it, and of updates of the EMA.

    Args:
        arguments: from `parse`.
        file: name of the file that is written.
        parameters: how many weights are averaged.
        save: called with the path of the file.
        load: likewise; puts the weights into the network.
        ema_updates: what updates the averages, by name.
    """
    path = Path(file).absolute()

    def save_durably():
        save(path)
        with path.open("rb") as opened:
            os.fsync(opened.fileno())

    figures = {"seconds": [], "load": []} | {name: [] for name in ema_updates}
    for update in ema_updates.values():
        update()  # the first is slower
    for _ in range(arguments.repeats):
        path.unlink(missing_ok=True)
        figures["seconds"].append(seconds(save_durably))
        figures["load"].append(seconds(lambda: load(path)))
        for name, update in ema_updates.items():
            figures[name].append(seconds(update))
    print_figures(parameters=parameters, bytes=path.stat().st_size, **figures)
