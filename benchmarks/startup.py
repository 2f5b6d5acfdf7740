"""Measures how long commands take to start: until --help is printed, and until the first line about the work itself.

That line is the plan of a run for the commands that train, and the result for those that sample or extract: networks
are tiny and nearly nothing is computed. Commands are run in turn.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import random_vae, scratch, write_features, write_images  # noqa: E402
from benchmarks.report import ROOT, Table  # noqa: E402
from dit.configuration import DiTConfig  # noqa: E402
from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser, at_least  # noqa: E402
from latent_diffusion.errors import InputError, command  # noqa: E402
from uvit_ldm.configuration import UViTConfig  # noqa: E402

SHARED = {"sample_size": 8, "patch_size": 4, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2}
SHARED |= {"attention_head_dim": 16}
DIT = DiTConfig.from_dict(SHARED | {"num_classes": 10})
UVIT = UViTConfig.from_dict(SHARED | {"clip_dim": 8, "num_text_tokens": 4})
VAE_CHANNELS = (4, 4, 4, 4)

# The line about the work that a command prints first.
WORK = re.compile(r"M parameters|^wrote |^encoded ")


@dataclass(frozen=True)
class Start:
    """A command, and the flags with which it comes to its work; None where only --help is measured."""

    script: str
    flags: Sequence[object] | None = None


TRAINER = ("--do_train", "--output_dir", "out", "--overwrite_output_dir", "--max_steps", 1, "--image_logging_steps", 0)
STARTS = (
    Start(
        "train.py", ("--model", "dit.json", "--image-size", 64, "--feature-path", "features", "--global-batch-size", 1)
    ),
    Start(
        "train_image_generation_dit_trainer.py",
        (*TRAINER, "--config_file", "dit.json", "--feature_path", "features"),
    ),
    Start(
        "train_txt2img_uvit_coco_trainer.py", (*TRAINER, "--unet_config_file", "uvit.json", "--feature_path", "coco")
    ),
    Start(
        "sample.py",
        ("--ckpt", "dit.pt", "--vae", "vae", "--num-sampling-steps", 1, "--class-labels", 0),
    ),
    Start(
        "extract_features.py", ("--data-path", "images", "--features-path", "out", "--vae", "vae", "--image-size", 64)
    ),
    *map(
        Start,
        ("sample_ddp.py", "sample_t2i.py", "extract_coco_features.py", "generate_pipelines.py", "evaluate.py"),
    ),
)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--commands", nargs="+", choices=[start.script for start in STARTS], help="without it all")
    add("--rounds", type=at_least(1), default=3, help="how often each is started (default: 3)")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    starts = [start for start in STARTS if start.script in (arguments.commands or start.script)]
    with scratch() as folder:
        write_inputs(Path(folder))
        rounds = [[measure(start, Path(folder)) for start in starts] for _ in range(arguments.rounds)]
    columns = ("command".ljust(max(len(start.script) for start in starts)), "--help, s", "first line about the work, s")
    table = Table("startup", f"Start-up, medians of {arguments.rounds}", columns, dict.fromkeys(columns[1:], ".2f"))
    for start, pairs in zip(starts, zip(*rounds, strict=True), strict=True):
        table.row(
            start.script, *(None if None in times else statistics.median(times) for times in zip(*pairs, strict=True))
        )
    table.write(rounds=rounds)


def write_inputs(folder: Path) -> None:
    """What the flags name: configurations, features, weights of DiT, a VAE and images."""
    runtime.start()
    from dit.modeling import DiT
    from dit.official import save_official

    DIT.save(folder / "dit.json")
    UVIT.save(folder / "uvit.json")
    save_official(DiT(DIT), folder / "dit.pt")
    random_vae(VAE_CHANNELS).save_pretrained(str(folder / "vae"), safe_serialization=False)
    write_features(folder / "features", DIT.resolution, 2)
    write_images(folder / "images", 2, (DIT.resolution, DIT.resolution))
    write_captioned(folder / "coco")


def write_captioned(folder: Path) -> None:
    """Features of one image and its caption in U-ViT's own layout."""
    from uvit_ldm.feature_files import caption_name, empty_context_path, image_name

    (folder / "train").mkdir(parents=True)
    context = np.zeros(UVIT.context_shape, np.float32)
    channels, *sides = UVIT.latent_shape
    np.save(empty_context_path(folder), context)
    np.save(folder / "train" / image_name(0), np.zeros((2 * channels, *sides), np.float32))
    np.save(folder / "train" / caption_name(0, 0), context)


def measure(start: Start, folder: Path) -> tuple[float, float | None]:
    """Seconds until `--help` has been printed, and until the first line about the work."""
    script = ROOT / start.script
    return seconds_until(re.compile(""), [script, "--help"], folder), (
        None if start.flags is None else seconds_until(WORK, [script, *start.flags], folder)
    )


def seconds_until(line: re.Pattern, words: Sequence[object], folder: Path) -> float:
    """Seconds until a command prints a line that matches.

    Raises:
        InputError: it ends without.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for printed in process.stdout:
            if line.search(printed):
                return time.perf_counter() - begin
        reason = process.stderr.read().strip().splitlines()[-1:]
        raise InputError(f"{Path(words[0]).name} ended without the line that is waited for: {''.join(reason)}")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
