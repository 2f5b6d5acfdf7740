"""A long run of a tiny model, with all that repeats: saves, evaluations, logged images, workers that read.

Memory, open files, threads and the time of a step must not grow with the number of steps.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.cli.commands import TINY, TRAIN, environment, write_features, write_reference
from tests.conftest import write_vae

# At scale 1; how often things happen, in steps, holds at every scale.
STEPS = 20_000
EVERY = {"--logging_steps": 20, "--save_steps": 100, "--image_logging_steps": 250, "--eval_steps": 500}

# What a run may grow by after its first fifth and its first evaluation, which fill caches.
MEMORY_LIMIT = 32 << 20  # bytes, over all processes
TIME_LIMIT = 1.25  # ratio of the processor time a step takes in the last fifth to that in the second


@dataclass
class Course:
    """What was seen of a run, sample by sample.

    Attributes:
        steps: the step that was logged last.
        memory: bytes of the run's process and its workers, by each: pages that workers share with it, until one of
            them writes there, count for both. Pages of files, which other programs may share, do not count.
        files, threads: open in the run's process.
        processor: seconds of it that the run's process has used.
        seconds: of a step, by the log.
    """

    steps: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def look(self, pid: int, log: Path) -> None:
        """Adds what is seen now; nothing where the run logs nothing yet, or is over."""
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("step ")]
        lines = [line for line in lines if ", steps_per_second " in line]
        step, last = map(int, lines[-1].split(":")[0].removeprefix("step ").split("/")) if lines else (0, 0)
        if step == last:
            return
        try:
            process = Path(f"/proc/{pid}")
            files, threads = (len(list((process / kind).iterdir())) for kind in ("fd", "task"))
            memory = sum(map(_anonymous, [pid, *_children(pid)]))
            processor = _processor_seconds(pid)
        except OSError:  # it ended while it was looked at
            return
        self.steps.append(step)
        self.memory.append(memory)
        self.files.append(files)
        self.threads.append(threads)
        self.processor.append(processor)
        self.seconds.append(1 / float(lines[-1].split(", steps_per_second ")[1].split(",")[0]))

    def between(self, start: float, end: float) -> "Course":
        """What was seen between these parts of the run."""
        first, last = np.searchsorted(self.steps, [start * self.steps[-1], end * self.steps[-1]])
        return Course(*(values[first : last + 1] for values in vars(self).values()))

    def slope(self, name: str) -> float:
        """Growth of a value in 1,000 steps, by the line that fits best."""
        return float(np.polyfit(self.steps, getattr(self, name), 1)[0] * 1000)


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def run(folder: Path, scale: float) -> dict[str, int | float | str]:
    """Trains for `scale` times 20,000 steps below `folder`; the picture is `soak.png` there.

    Raises:
        AssertionError: the run fails, or something grows.
    """
    steps = max(int(STEPS * scale), 2 * EVERY["--eval_steps"])
    course, ended = watch(folder, steps)
    plot(course, folder / "soak.png")
    settled = course.between(max(0.2, 1.2 * EVERY["--eval_steps"] / steps), 1.0)
    second, last = (course.between(*part).slope("processor") for part in ((0.2, 0.4), (0.8, 1.0)))
    growth = settled.slope("memory") * (settled.steps[-1] - settled.steps[0]) / 1000
    figures = {
        "steps": steps,
        "saves": steps // EVERY["--save_steps"],
        "evaluations": steps // EVERY["--eval_steps"],
        "image logs": steps // EVERY["--image_logging_steps"],
        "memory at the end, MiB": round(course.memory[-1] / 2**20, 1),
        "memory, MiB per 1,000 steps": round(settled.slope("memory") / 2**20, 4),
        "open files per 1,000 steps": round(settled.slope("files"), 4),
        "threads per 1,000 steps": round(settled.slope("threads"), 4),
        "processor time of a step, last fifth over second": round(last / second, 3),
        "wall time of a step, the same": round(_wall_ratio(course), 3),
        "minutes": round(ended / 60, 1),
    }
    assert growth < MEMORY_LIMIT, f"memory grew by {growth / 2**20:.1f} MiB: {figures}"
    for name in ("files", "threads"):
        values = getattr(settled, name)
        part = max(len(values) // 5, 1)  # one that is open for a moment only does not count
        assert min(values[-part:]) <= min(values[:part]), f"{name} grew: {figures}"
    if steps >= 10 * EVERY["--eval_steps"]:  # else a fifth of the run has an evaluation, or none
        assert last / second < TIME_LIMIT, f"steps became slower: {figures}"
    return figures


def _wall_ratio(course: Course) -> float:
    second, last = (np.median(course.between(*part).seconds) for part in ((0.2, 0.4), (0.8, 1.0)))
    return float(last / second)


def watch(folder: Path, steps: int) -> tuple[Course, float]:
    """Runs the training and looks at it until it ends; also gives its seconds."""
    command, log = _command(folder, steps), folder / "log.txt"
    course, start = Course(), time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(min(1.0, 0.2 + steps / 10_000))
                course.look(process.pid, log)
                if course.steps and len(course.steps) % 60 == 0:
                    print(f"step {course.steps[-1]} of {steps}, {course.memory[-1] >> 20} MiB", flush=True)
        finally:
            process.kill()
    assert process.returncode == 0, log.read_text(errors="replace")[-2000:]
    return course, time.monotonic() - start


def _command(folder: Path, steps: int) -> list[str]:
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "vae").mkdir()
    write_vae(folder / "vae")
    write_features(folder / "features", 64)
    reference = write_reference(folder / "images.npz")
    flags = {
        "--config_file": "tiny.json",
        "--feature_path": "features",
        "--output_dir": "out",
        "--max_steps": steps,
        "--per_device_train_batch_size": 4,
        "--dataloader_num_workers": 2,
        "--save_total_limit": 2,
        "--num_inference_steps": 2,
        "--vae_name_or_path": "vae",
        "--eval_samples": 40,
        "--eval_reference": reference,
        "--eval_extractor": "pixels",
        "--disable_tqdm": True,
        **EVERY,
    }
    return [sys.executable, TRAIN, "--do_train", *(str(part) for pair in flags.items() for part in pair)]


def plot(course: Course, path: Path) -> None:
    """Draws the course of a run: one panel a quantity over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "memory of all processes, MiB": np.array(course.memory) / 2**20,
        "open files": course.files,
        "threads": course.threads,
        "processor time, seconds": course.processor,
        "milliseconds a step, by the log": np.array(course.seconds) * 1000,
    }
    figure, axes = pyplot.subplots(len(panels), sharex=True, figsize=(9, 12), layout="constrained")
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        ax.plot(course.steps, values, linewidth=1)
        ax.set_title(title, loc="left")
        ax.set_ylim(0, 1.2 * max(values))
        ax.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
