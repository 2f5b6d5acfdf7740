"""Runs the benchmarks, all or those that are named, one after another; each writes output/bench/<name>.json."""

import argparse
import subprocess
import sys
from pathlib import Path

from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import InputError, command

# In this order: first what compares with peers.
NAMES = ("training_step", "sdxl_lora", "guided_sampling", "loading", "startup", "checkpoints", "scaling", "ablation")
NAMES += ("features", "sampling", "training", "token_merging", "evaluation")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in NAMES:
            raise InputError(f"there is no benchmark {name!r}; there are {', '.join(NAMES)}")
    return arguments


@command
def main() -> None:
    failed = []
    for name in parse_arguments().names or NAMES:
        print(f"\n# {name}", flush=True)
        if subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py")]).returncode:
            failed.append(name)
    if failed:
        raise InputError(f"{len(failed)} of the benchmarks failed: {', '.join(failed)}; their last lines say why")


if __name__ == "__main__":
    main()
