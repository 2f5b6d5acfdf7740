"""Measures a training step (forward, loss, backward, AdamW, EMA) of this project beside ppdiffusers and PyTorch.

Each contestant is a program of its own in benchmarks/peers, run once per round, in turn. All train on random latents
with the same loss; their docstrings say what each computes. Stock ppdiffusers runs without this project's runtime
settings, but with a thread for every core; PyTorch runs as it is installed. "PyTorch eager" is the fastest contestant
in PyTorch, float32, neither compiled nor with gradient checkpointing.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from benchmarks.peak import Peak, matrix_peak  # noqa: E402
from benchmarks.report import ROOT, Table, write  # noqa: E402
from dit.configuration import DiTConfig  # noqa: E402
from latent_diffusion.command_line import ArgumentParser, at_least  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402
from latent_diffusion.native.library import has_bfloat16  # noqa: E402
from uvit_ldm.configuration import UViTConfig  # noqa: E402


@dataclass(frozen=True)
class Workload:
    """What is trained on: a model, and the samples of a step."""

    config: DiTConfig | UViTConfig
    batch_size: int

    @property
    def network(self) -> str:
        """The name by which the programs know it."""
        return "UViT" if isinstance(self.config, UViTConfig) else "DiT"

    @property
    def flops(self) -> int:
        """Of a training step, by the model's count: what recompute repeats is not counted."""
        return TRAINING * self.batch_size * forward_flops(self.config)


WORKLOADS = {
    "DiT-S/2": Workload(DiTConfig.from_name("DiT-S/2"), 8),
    "DiT-B/4": Workload(DiTConfig.from_name("DiT-B/4"), 16),
    "U-ViT-S/2 deep": Workload(UViTConfig.from_json(ROOT / "config" / "uvit_t2i_small_deep.json"), 4),
}

OURS, OURS_RECOMPUTE, OURS_BF16 = "this project", "this project, recompute", "this project, bf16"
OURS_LAUNCHED = "this project, a process per core"
PPDIFFUSERS, PPDIFFUSERS_RECOMPUTE = "ppdiffusers", "ppdiffusers, recompute"

# What is appended to the name of a library in PyTorch, and the flags that it stands for.
EAGER, COMPILED = "", ", compiled"
VARIANTS = {
    EAGER: [],
    ", checkpointing": ["--checkpointing"],
    COMPILED: ["--compiled"],
    ", bf16": ["--bf16"],
    ", bf16, compiled": ["--bf16", "--compiled"],
}
LIBRARIES = DIFFUSERS, OFFICIAL = "diffusers", "official code"

# By network: library, its name of the network, and variants. The official DiT beside diffusers' is run in two only.
PYTORCH = {
    "DiT": [(DIFFUSERS, "DiTTransformer2DModel", VARIANTS), (OFFICIAL, "DiT", (EAGER, COMPILED))],
    "UViT": [(OFFICIAL, "UViT", VARIANTS)],
}

# Rivals that are not known by name before all have run.
PYTORCH_EAGER, PYTORCH_COMPILED = "PyTorch eager", "PyTorch compiled"
PYTORCH_SMALLEST = "PyTorch eager with the least memory"

# Steps before those that are timed; a compiled network needs more.
WARM_UP, COMPILED_WARM_UP = 2, 3

COLUMNS = (
    "contestant".ljust(len(OURS_LAUNCHED)),
    "s/step",
    "min   ",
    "max   ",
    "over PyTorch eager",
    "of peak",
    "peak memory, GiB",
    "activations, GiB",
)


def _seconds(result: Result) -> float:
    return result.median


def _memory(result: Result) -> float:
    return result.peak_memory


def _activations(result: Result) -> float:
    """Bytes of the peak beside what is held between steps and the gradients of a step."""
    return statistics.median(run["peak_memory"] - run["memory_at_rest"] - run["gradients"] for run in result.runs)


def _ema_seconds(result: Result) -> float:
    return result.figure("ema_seconds")


@dataclass(frozen=True)
class Target:
    """`value` of one contestant over `base` of another, and what that may be at most; `what` is a template of both."""

    what: str
    name: str
    value: Callable[[Result], float]
    rival: str
    base: Callable[[Result], float]
    limit: float


TIME, MEMORY, ACTIVATIONS = (f"{what}: {{}} / {{}}" for what in ("time", "peak memory", "activations"))

TARGETS = (
    Target(TIME, OURS, _seconds, PYTORCH_EAGER, _seconds, 0.95),
    Target(TIME, OURS_LAUNCHED, _seconds, PYTORCH_EAGER, _seconds, 0.95),
    Target(TIME, OURS, _seconds, PPDIFFUSERS, _seconds, 0.35),
    Target(TIME, OURS, _seconds, PYTORCH_COMPILED, _seconds, 0.8),
    Target(MEMORY, OURS, _memory, PYTORCH_SMALLEST, _memory, 1.0),
    Target(ACTIVATIONS, OURS_RECOMPUTE, _activations, OURS, _activations, 0.4),
    Target(TIME, OURS_RECOMPUTE, _seconds, OURS, _seconds, 1.35),
    Target(TIME, OURS_BF16, _seconds, OURS, _seconds, 1 / 1.3),
    Target("time: {}, EMA / step", OURS, _ema_seconds, OURS, _seconds, 0.03),
)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="what is trained (default: all)")
    add("--rounds", type=at_least(1), default=2, help="runs of each contestant (default: 2)")
    add("--steps", type=at_least(1), default=2, help="steps of a run that are timed (default: 2)")
    add("--device", choices=["cpu", "gpu"], help="without it the GPU if there is one")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    peer = peer_python()
    peak = matrix_peak(arguments.device, peer)
    print(peak, flush=True)
    entries = {name: contestants(WORKLOADS[name], peak.place, arguments.steps, peer) for name in arguments.models}
    progress = Progress(arguments.rounds * sum(map(len, entries.values())))
    results, tables = {}, []
    for name in arguments.models:
        results[name] = compete(entries[name], arguments.rounds, progress)
        tables.append(tabulate(name, results[name], peak))
    targets = tabulate_targets(results)
    for settings in sorted({run["settings"] for found in results.values() for run in found[OURS].runs}):
        print(f"\n{OURS} ran with {settings}")
    report = {"peak": peak.rates, "tables": [table.content() for table in tables], "targets": targets.content()}
    report["runs"] = {name: {who: result.runs for who, result in found.items()} for name, found in results.items()}
    write("training-step", report)
    raise_failures([result for found in results.values() for result in found.values()])


def contestants(workload: Workload, place: str, steps: int, peer: Path | None) -> list[Contestant]:
    """Who trains this model; those in PyTorch only where there is an interpreter that has it."""
    cores = len(os.sched_getaffinity(0))

    def entry(name: str, program: Sequence[object], network: str, *flags: str, **variables: str) -> Contestant:
        warm_up = COMPILED_WARM_UP if "--compiled" in flags else WARM_UP
        arguments = [network, json.dumps(workload.config.to_dict()), "--batch-size", workload.batch_size]
        arguments += ["--warm-up", warm_up, "--steps", steps, "--device", place]
        return Contestant(name, [*program, *arguments, *flags], variables)

    network = workload.network
    ours, stock = ([sys.executable, PEERS / f"{name}_step.py"] for name in ("ours", "ppdiffusers"))
    found = [entry(OURS, ours, network), entry(OURS_RECOMPUTE, ours, network, "--recompute")]
    if place == "gpu" or has_bfloat16():
        found.append(entry(OURS_BF16, ours, network, "--bf16"))
    if place == "cpu" and workload.batch_size % cores == 0:
        launch = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", cores, ours[1]]
        found.append(entry(OURS_LAUNCHED, launch, network, OMP_NUM_THREADS="1"))
    threads = {"OMP_NUM_THREADS": str(cores)}  # Paddle's default is one
    found.append(entry(PPDIFFUSERS, stock, network, **threads))
    found.append(entry(PPDIFFUSERS_RECOMPUTE, stock, network, "--recompute", **threads))
    if peer:
        program = [peer, PEERS / "torch_step.py"]
        for library, name, variants in PYTORCH[network]:
            found += [entry(library + variant, program, name, *VARIANTS[variant]) for variant in variants]
    return found


def tabulate(name: str, results: Mapping[str, Result], peak: Peak) -> Table:
    """The table of one model."""
    workload = WORKLOADS[name]
    title = f"{name}, {workload.batch_size} samples a step, {workload.flops / 1e9:.0f} GFLOP"
    table = Table(name, title, COLUMNS, {"of peak": ".0%"})
    reference = best(results, EAGER)
    for result in results.values():
        if result.failure:
            table.failed(result.name, result.failure)
            continue
        table.row(
            result.name,
            result.median,
            result.min,
            result.max,
            result.median / reference.median if reference else None,
            None if "bf16" in result.name else peak.share(workload.flops, result.median),
            result.peak_memory / 2**30,
            _activations(result) / 2**30,
        )
    return table


def tabulate_targets(results: Mapping[str, Mapping[str, Result]]) -> Table:
    """The targets of all models whose contestants have run."""
    table = Table("targets", "Targets", ("model".ljust(14), "ratio".ljust(60), "value ", "at most", "outcome"))
    for model, found in results.items():
        rivals = found | {PYTORCH_EAGER: best(found, EAGER), PYTORCH_COMPILED: best(found, COMPILED)}
        rivals[PYTORCH_SMALLEST] = best(found, EAGER, _memory)
        for target in TARGETS:
            own, rival = rivals.get(target.name), rivals.get(target.rival)
            if any(result is None or result.failure for result in (own, rival)):
                continue
            value = target.value(own) / target.base(rival)
            what = target.what.format(own.name, rival.name)
            table.row(model, what, value, target.limit, "met" if value <= target.limit else "missed")
    return table


def best(results: Mapping[str, Result], variant: str, measure: Callable[[Result], float] = _seconds) -> Result | None:
    """The contestant in PyTorch of one variant that is best by `measure`; None if none has run."""
    found = [results.get(library + variant) for library in LIBRARIES]
    return min((result for result in found if result and not result.failure), key=measure, default=None)


if __name__ == "__main__":
    main()
