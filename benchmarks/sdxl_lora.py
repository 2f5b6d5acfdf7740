"""Measures SDXL LoRA fine-tuning: a training step beside diffusers and peft, and the images per second of the command.

All networks are of Stable Diffusion XL's anatomy at a quarter of its width, with random weights, at 256 pixels. In the
first tables each contestant is a program of its own in benchmarks/peers, run once per round, in turn: forward, loss,
backward, clipping and AdamW of rank 4 in the UNet. In the last one each row is one run of
`train_text_to_image_lora_sdxl.py` on a pipeline that is written for it, with the FPS that it prints; captions have 16
tokens there.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
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
from benchmarks.measure import STABLE_DIFFUSION_CHANNELS, printed, random_vae, scratch, write_images  # noqa: E402
from benchmarks.report import ROOT, Table, write  # noqa: E402
from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser, at_least  # noqa: E402
from latent_diffusion.errors import InputError, command  # noqa: E402
from latent_diffusion.meter import FIRST_STEPS  # noqa: E402

# Widths of both text encoders, and their layers: a quarter of Stable Diffusion XL's.
TEXT_WIDTHS = (192, 320)
TEXT_LAYERS = (3, 8)

RESOLUTION = 256
UNET = {
    "sample_size": RESOLUTION // 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [80, 160, 320],
    "layers_per_block": 2,
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 4],
    "norm_num_groups": 16,
    "use_linear_projection": True,
    "cross_attention_dim": sum(TEXT_WIDTHS),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + TEXT_WIDTHS[1],
}

OURS, OURS_RECOMPUTE = "this project", "this project, recompute"
DIFFUSERS, DIFFUSERS_CHECKPOINTING = "diffusers + peft", "diffusers + peft, checkpointing"

# Steps before those that are timed.
WARM_UP = 2

STEP_COLUMNS = (
    "contestant".ljust(len(DIFFUSERS_CHECKPOINTING)),
    "s/step",
    "min   ",
    "max   ",
    "FPS   ",
    "over diffusers",
    "peak memory, GiB",
    "activations, GiB",
)
COMMAND_COLUMNS = ("processes", "threads each", "encoders     ", "FPS   ", "over one thread")

CAPTIONS = ("a cat in the rain", "a red house by the sea")
IMAGES = 8


@dataclass(frozen=True)
class Setting:
    """How the command is run: processes, the CPU threads of each, and whether latents and contexts are cached."""

    processes: int
    threads: int
    cached: bool


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch-sizes", nargs="+", type=at_least(1), default=[1, 2], help="images of a step (default: 1 2)")
    add("--rounds", type=at_least(1), default=2, help="runs of each contestant (default: 2)")
    add("--steps", type=at_least(1), default=5, help="steps of a run that are timed (default: 5)")
    add("--command-steps", type=at_least(1), default=20, help="likewise, of the command (default: 20)")
    add("--device", choices=["cpu", "gpu"], help="without it the GPU if there is one")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    peer = peer_python()
    runtime.start()
    from latent_diffusion import device

    place = device.select(arguments.device)
    entries = {size: contestants(size, arguments.steps, place, peer) for size in arguments.batch_sizes}
    progress = Progress(arguments.rounds * sum(map(len, entries.values())))
    results, tables = {}, []
    for size, found in entries.items():
        results[size] = compete(found, arguments.rounds, progress)
        tables.append(tabulate(size, results[size]))
    tables.append(measure_command(place, arguments.command_steps))
    for settings in sorted({run["settings"] for found in results.values() for run in found[OURS].runs}):
        print(f"\n{OURS} ran with {settings}")
    report = {"unet": UNET, "tables": [table.content() for table in tables]}
    report["runs"] = {size: {who: result.runs for who, result in found.items()} for size, found in results.items()}
    write("sdxl-lora", report)
    raise_failures([result for found in results.values() for result in found.values()])


def contestants(batch_size: int, steps: int, place: str, peer: Path | None) -> list[Contestant]:
    """Who trains; those in PyTorch only where there is an interpreter that has it."""
    arguments = ["UNet2DConditionModel", json.dumps(UNET), "--batch-size", batch_size]
    arguments += ["--warm-up", WARM_UP, "--steps", steps, "--device", place]
    ours = [sys.executable, PEERS / "ours_lora_step.py", *arguments]
    found = [Contestant(OURS, ours), Contestant(OURS_RECOMPUTE, [*ours, "--recompute"])]
    if peer:
        program = [peer, PEERS / "diffusers_lora_step.py", *arguments]
        found += [Contestant(DIFFUSERS, program), Contestant(DIFFUSERS_CHECKPOINTING, [*program, "--checkpointing"])]
    return found


def tabulate(batch_size: int, results: Mapping[str, Result]) -> Table:
    """The table of one batch size; "activations" is the peak beside what is held between steps."""
    table = Table("sdxl-lora", f"LoRA step, {batch_size} image(s) of {RESOLUTION} pixels a step", STEP_COLUMNS)
    rival = results.get(DIFFUSERS)
    reference = rival if rival and not rival.failure else None
    for result in results.values():
        if result.failure:
            table.failed(result.name, result.failure)
            continue
        table.row(
            result.name,
            result.median,
            result.min,
            result.max,
            batch_size / result.median,
            result.median / reference.median if reference else None,
            result.peak_memory / 2**30,
            max(run["peak_memory"] - run["memory_at_rest"] for run in result.runs) / 2**30,
        )
    return table


def measure_command(place: str, steps: int) -> Table:
    """The table of the command, one image a step on each process."""
    cores = len(os.sched_getaffinity(0))
    shapes = [(1, 1), (1, cores), (2, 1)] if place == "cpu" else [(1, cores)]
    table = Table("command", f"train_text_to_image_lora_sdxl.py, {steps} steps a row, {cores} cores", COMMAND_COLUMNS)
    with scratch() as folder:
        write_pipeline(Path(folder) / "base")
        write_captioned_images(Path(folder) / "images")
        for cached in (False, True):
            one_thread = None
            for processes, threads in dict.fromkeys(shapes):
                fps = measure_fps(Setting(processes, threads, cached), place, steps, Path(folder))
                if (processes, threads) == (1, 1):
                    one_thread = fps
                ratio = one_thread and fps / one_thread
                table.row(processes, threads, "cached" if cached else "in every step", fps, ratio)
    return table


def measure_fps(setting: Setting, place: str, steps: int, folder: Path) -> float:
    """The images per second that one run prints; it reads folder/base and folder/images.

    Raises:
        InputError: it fails, or prints none.
    """
    launch = ("-m", "paddle.distributed.launch", "--nproc_per_node", setting.processes) if setting.processes > 1 else ()
    flags = ["--pretrained_model_name_or_path", "base", "--train_data_dir", "images", "--resolution", RESOLUTION]
    flags += ["--train_batch_size", 1, "--max_train_steps", FIRST_STEPS + steps, "--output_dir", "out"]
    flags += ["--overwrite_output_dir", "--save_strategy", "no", "--report_to", "none", "--device", place]
    script = ROOT / "train_text_to_image_lora_sdxl.py"
    environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads), "HF_HOME": str(folder / "huggingface")}
    output = printed([*launch, script, *flags, *(["--cache_latents"] if setting.cached else [])], folder, environment)
    if not (found := re.search(r"FPS ([\d.]+)", output)):
        raise InputError(f"{script} printed no FPS: {output.strip().splitlines()[-1:]}")
    return float(found[1])


def write_pipeline(folder: Path) -> None:
    """A pipeline of ppdiffusers with `UNET`, and encoders of that size."""
    runtime.import_paddlenlp()
    from ppdiffusers import UNet2DConditionModel
    from ppdiffusers.transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from demo.tiny_sdxl import write_pipeline as write_tiny_pipeline

    write_tiny_pipeline(folder, CAPTIONS, random_vae([count // 4 for count in STABLE_DIFFUSION_CHANNELS]))
    UNet2DConditionModel(**UNET).save_pretrained(str(folder / "unet"))
    parts = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for (part, network), width, layers in zip(parts.items(), TEXT_WIDTHS, TEXT_LAYERS, strict=True):
        config = CLIPTextConfig.from_pretrained(str(folder / part))
        config.hidden_size = config.projection_dim = width
        config.intermediate_size, config.num_hidden_layers = 4 * width, layers
        network(config).save_pretrained(str(folder / part))


def write_captioned_images(folder: Path) -> None:
    """JPEG files and the `metadata.jsonl` that captions them."""
    write_images(folder, IMAGES)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    lines = [json.dumps({"file_name": name, "text": CAPTIONS[i % len(CAPTIONS)]}) for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
