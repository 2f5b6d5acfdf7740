"""The flags that the programs of a training step share, and what is measured of it. Standard library only."""

import argparse
import json

from timing import memory_in_use, peak_memory, seconds


def parse(description, *switches):
    """The flags common to all, and switches of a program's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("network", help="what is trained")
    add("config", type=json.loads, help="its configuration, JSON")
    add("--batch-size", type=int, required=True, help="samples of a step, on all processes together")
    add("--warm-up", type=int, required=True, help="steps before those that are timed")
    add("--steps", type=int, required=True, help="steps that are timed")
    add("--device", choices=["cpu", "gpu"], required=True)
    for switch in switches:
        add(switch, action="store_true")
    return parser.parse_args()


def measure(step, arguments, cuda=None):
    """Seconds of each timed call of `step`, and memory in bytes: at most, and after the last."""
    for _ in range(arguments.warm_up):
        step()
    return {
        "seconds": [seconds(step, cuda) for _ in range(arguments.steps)],
        "peak_memory": peak_memory(cuda),
        "memory_at_rest": memory_in_use(cuda),
    }
