"""Measures how training scales from one process to two on this machine: steps/s, samples/s and efficiency.

Each row is one run of the training command, whose last log line gives the figures; the steps before it warm up. Data
and weights are random: they do not change the time. On a CPU each process of a launched run has one thread, so two are
compared with one process of one thread ("efficiency": samples/s of each process, over those of that one) and with one
process that uses all cores ("of all cores": samples/s over those; below 100 % launching two does not pay).
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import last_figures, scratch, write_features  # noqa: E402
from benchmarks.report import ROOT, Table  # noqa: E402
from dit.configuration import DiTConfig  # noqa: E402
from latent_diffusion.command_line import ArgumentParser  # noqa: E402
from latent_diffusion.errors import InputError, command  # noqa: E402

SMALL = ROOT / "config" / "DiT_S_patch4.json"
COLUMNS = ("processes", "threads each", "batch each", "global batch", "steps/s", "samples/s")
COLUMNS += ("efficiency", "of all cores")


@dataclass
class Setting:
    """What one row measures: processes, the CPU threads of each, and the samples of a step on each."""

    processes: int
    threads: int
    batch: int


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--config-file", type=Path, default=SMALL, help="model; the default is a small one, DiT-S/4 at 256 pixels")
    add("--batch-size", type=int, default=8, help="samples of a step on one process, an even number")
    add("--steps", type=int, default=10, help="steps to measure, after as many to warm up")
    arguments = parser.parse_args()
    if arguments.batch_size < 2 or arguments.batch_size % 2:
        raise InputError(f"--batch-size must be even, two processes share it, but is {arguments.batch_size}")
    if arguments.steps < 1:
        raise InputError(f"--steps must be at least 1, not {arguments.steps}")
    return arguments


@command
def main() -> None:
    arguments = parse_arguments()
    model = arguments.config_file.absolute()
    image_size = DiTConfig.from_json(model).sample_size * 8
    batch, cores = arguments.batch_size, len(os.sched_getaffinity(0))
    note = ", a small model (--config-file names another)" if model == SMALL else ""
    settings = [Setting(1, 1, batch), Setting(1, cores, batch), Setting(2, 1, batch), Setting(2, 1, batch // 2)]
    with scratch() as folder:
        write_features(Path(folder) / "features", image_size, 4 * batch)
        figures = [measure(setting, model, arguments.steps, Path(folder)) for setting in settings]
    one_thread, all_cores = (figures[i]["samples_per_second"] for i in range(2))
    title = f"{model.stem}{note}, {arguments.steps} steps a row, {cores} cores"
    table = Table("scaling", title, COLUMNS, {"efficiency": ".0%", "of all cores": ".0%"})
    for setting, row in zip(settings, figures, strict=True):
        samples = row["samples_per_second"]
        table.row(
            setting.processes,
            setting.threads,
            setting.batch,
            setting.processes * setting.batch,
            row["steps_per_second"],
            samples,
            samples / (setting.processes * one_thread),
            samples / all_cores,
        )
    table.write()


def measure(setting: Setting, model: Path, steps: int, folder: Path) -> dict[str, float]:
    """What one run logs, by name; it reads folder/features."""
    launch = ("-m", "paddle.distributed.launch", "--nproc_per_node", setting.processes) if setting.processes > 1 else ()
    flags = ("--do_train", "--config_file", model, "--feature_path", "features", "--output_dir", "out")
    flags += ("--overwrite_output_dir", "--max_steps", 2 * steps, "--logging_steps", steps, "--image_logging_steps", 0)
    flags += ("--per_device_train_batch_size", setting.batch)
    script = ROOT / "train_image_generation_dit_trainer.py"
    environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads)}
    return last_figures([*launch, script, *flags], folder, environment)


if __name__ == "__main__":
    main()
