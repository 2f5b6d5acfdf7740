"""Measures what each measure for the CPU is worth: a training step with one of them turned off at a time.

Each row is the training step of `training_step.py`, as this project makes it, in a process of its own.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contest import Contestant, Progress, compete, raise_failures  # noqa: E402
from benchmarks.report import Table  # noqa: E402
from benchmarks.training_step import OURS, WORKLOADS, contestants  # noqa: E402
from latent_diffusion.command_line import ArgumentParser, at_least  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402

# What turns a measure off: variables that `runtime.start()` and the kernels heed.
WITHOUT_KERNELS = {"LATENT_DIFFUSION_KERNELS": "off"}
WITHOUT = {
    "kernels": WITHOUT_KERNELS,
    "math library path (MKL_DEBUG_CPU_TYPE)": {"MKL_DEBUG_CPU_TYPE": "0"},
    "a thread for each core (OMP_NUM_THREADS)": {"OMP_NUM_THREADS": "1"},
    "memory that is kept (mallopt)": {"MALLOC_ARENA_TEST": "8"},  # glibc's default; any choice of the user's counts
    "dense transposes (FLAGS_use_stride_kernel)": {"FLAGS_use_stride_kernel": "1"},
    "kernels and dense transposes": WITHOUT_KERNELS | {"FLAGS_use_stride_kernel": "1"},
    "any of them, but threads": WITHOUT_KERNELS
    | {"LATENT_DIFFUSION_TUNING": "off", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))},
}


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(WORKLOADS), default="DiT-S/2", help="what is trained (default: DiT-S/2)")
    add("--rounds", type=at_least(1), default=2, help="runs of each row (default: 2)")
    add("--steps", type=at_least(1), default=2, help="steps of a run that are timed (default: 2)")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    workload = WORKLOADS[arguments.model]
    ours = contestants(workload, "cpu", arguments.steps, None)[0]
    rows = [ours] + [Contestant(f"without {name}", ours.command, variables) for name, variables in WITHOUT.items()]
    results = compete(rows, arguments.rounds, Progress(arguments.rounds * len(rows)))
    title = f"{arguments.model}, {workload.batch_size} samples a step, float32"
    table = Table("ablation", title, (OURS.ljust(50), "s/step", "over this project", "peak memory, GiB"))
    for result in results.values():
        if result.failure:
            table.failed(result.name, result.failure)
            continue
        table.row(result.name, result.median, result.median / results[OURS].median, result.peak_memory / 2**30)
    table.write(runs={name: result.runs for name, result in results.items()})
    raise_failures(results.values())


if __name__ == "__main__":
    main()
