"""Fine-tuning with LoRA on real digits: a tiny Stable Diffusion XL learns what the names of colors mean.

`make demo-lora` runs it. The steps from the data set on are commands that work the same with SDXL itself and other
images; those before make what one would download.
"""

import os
import time
from pathlib import Path

import numpy as np

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import command
from latent_diffusion.files import write_json

from .captions import WORDS
from .colors import Prompt, as_white, make_prompts, name_colors, share_in_color
from .steps import Steps, begin, check_least, print_table

DATA, OUTPUT = Path("data/demo-lora"), Path("output/demo-lora")
IMAGES, DATASET = DATA / "images", DATA / "dataset"
VAE, BASE, TRAINING, MERGED = OUTPUT / "vae", OUTPUT / "base", OUTPUT / "training", OUTPUT / "merged"

STEPS, BATCH_SIZE = 500, 16

COMMANDS = {
    "draw the digits, and write a data set of colored ones": f"""-m demo.colors
        --images-path {IMAGES} --dataset-path {DATASET}""",
    "train a small autoencoder on digits in many colors": f"""-m demo.train_autoencoder
        --data-path {IMAGES}/train --output-dir {VAE} --colored""",
    "train a base pipeline on digits in colors that it is not told": f"""-m demo.train_sdxl_base
        --data-path {IMAGES}/train --vae {VAE} --output-dir {BASE}""",
    "fine-tune it with LoRA on the colored digits": f"""train_text_to_image_lora_sdxl.py
        --pretrained_model_name_or_path {BASE} --dataset_name {DATASET} --output_dir {TRAINING}
        --resolution 64 --center_crop --cache_latents --rank 16 --train_batch_size {BATCH_SIZE}
        --max_train_steps {STEPS} --learning_rate 5e-3 --lr_scheduler cosine --lr_warmup_steps 50
        --checkpointing_steps {STEPS} --logging_steps 20 --dataloader_num_workers 1 --seed 0
        --validation_prompts "a red three" "a green five" "a blue eight" "a yellow nine"
        --image_logging_steps {STEPS // 2} --num_inference_steps 20 --guidance_scale 2""",
    "merge the LoRA into the pipeline": f"""scripts/merge_sdxl_lora.py
        --pretrained_model_name_or_path {BASE} --lora_path {TRAINING} --output_path {MERGED}""",
}

LOSSES = ("loss",)
# Images of each prompt.
IMAGES_PER_PROMPT = 2
# What the demo promises; it fails where a figure falls short.
LEAST_OTHERS_BEFORE, LEAST_IN_COLOR, LEAST_RECOGNIZED, LEAST_ALIKE = 0.60, 0.95, 0.90, 0.999


@command
def main() -> None:
    ArgumentParser(description=__doc__).parse_args()
    start = time.monotonic()
    # Convolutions as small as these gain little from a second thread, and lose where other programs run.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runtime.announce(runtime.start())
    begin(DATA, OUTPUT)
    steps = Steps(len(COMMANDS) + 1)
    for title, line in COMMANDS.items():
        steps.run(title, line)
    steps.begin("draw the same prompts without LoRA, with it, and with the merged pipeline")
    figures, measured = _report()
    figures["total minutes"] = f"{(time.monotonic() - start) / 60:.1f}"
    print_table(figures)
    check_least(
        [
            (1 - measured["in_color_before"], LEAST_OTHERS_BEFORE, "of the images before have a color not asked for"),
            (measured["in_color"], LEAST_IN_COLOR, "of the images after have the color that was asked for"),
            (measured["recognized"], LEAST_RECOGNIZED, "of the images after show the digit that was asked for"),
            (measured["merged_alike"], LEAST_ALIKE, "of the merged pipeline's values are those of base and LoRA"),
        ]
    )
    print(f"look at {OUTPUT}/before_after.png and {OUTPUT}/loss.png")


def _report() -> tuple[dict[str, str], dict[str, float]]:
    """The table's rows, and what was measured."""
    from sdxl_lora.lora import read_lora

    from . import report
    from .digits import load_folder
    from .judge import Judge
    from .pipelines import load_sdxl

    prompts = make_prompts() * IMAGES_PER_PROMPT
    texts = [prompt.text for prompt in prompts]
    before, after, merged = (
        load_sdxl(folder, lora).draw(texts) for folder, lora in ((BASE, None), (BASE, TRAINING), (MERGED, None))
    )
    _before_after(before, after, prompts).save(OUTPUT / "before_after.png")
    scalars = report.read_scalars(TRAINING, LOSSES)
    report.loss_plot(scalars, LOSSES, "LoRA of a tiny SDXL on colored digits", OUTPUT / "loss.png")
    measured = measure(before, after, prompts, Judge().fit(*load_folder(IMAGES / "train")))
    measured["merged_alike"] = share_alike(after, merged)
    write_json(OUTPUT / "report.json", measured)
    figures = {
        "LoRA weights": f"{sum(array.size for array in read_lora(TRAINING).values()) / 1e6:.3f} M",
        "training images/s": f"{BATCH_SIZE * scalars['steps_per_second'].mean:.1f}",
        "final loss": f"{scalars['loss'].values[-1]:.4f}",
        f"color as asked for before, of {len(prompts)} images": f"{measured['in_color_before']:.1%}",
        "color as asked for after": f"{measured['in_color']:.1%}",
        "digits recognized before": f"{measured['recognized_before']:.1%}",
        "digits recognized after": f"{measured['recognized']:.1%}",
        "both, where training had that digit in that color": f"{measured['both_known']:.1%}",
        "both, where it had not": f"{measured['both_new']:.1%}",
        "the merged pipeline draws alike": f"{measured['merged_alike']:.2%}",
    }
    return figures, measured


def measure(before: np.ndarray, after: np.ndarray, prompts: list[Prompt], judge) -> dict[str, float]:
    """What fine-tuning changed: shares of images, each in 0..1.

    Args:
        before, after: of the prompts, uint8 `[N, 64, 64, 3]`.
        prompts: what was asked for.
        judge: reads white digits, see `Judge`.
    """
    digits = np.array([prompt.digit for prompt in prompts])
    new = np.array([prompt.is_new for prompt in prompts])
    colors = [prompt.color for prompt in prompts]
    both = (judge.read(as_white(after)) == digits) & (name_colors(after) == np.array(colors))
    return {
        "in_color_before": share_in_color(before, colors),
        "recognized_before": judge.accuracy(as_white(before), digits),
        "in_color": share_in_color(after, colors),
        "recognized": judge.accuracy(as_white(after), digits),
        "both_known": float(both[~new].mean()),
        "both_new": float(both[new].mean()),
    }


def share_alike(one: np.ndarray, other: np.ndarray) -> float:
    """The share, 0..1, of values in two arrays of images, uint8 of one shape, that differ by 1 at most, as rounded."""
    return float((np.abs(one.astype(np.int16) - other) <= 1).mean())


def _before_after(before: np.ndarray, after: np.ndarray, prompts: list[Prompt]):
    """The first image of each prompt, a row a color: before above after."""
    from latent_diffusion.images import captioned_grid

    images, texts = [], []
    for start in range(0, len(prompts) // IMAGES_PER_PROMPT, len(WORDS)):
        row = slice(start, start + len(WORDS))
        images += [*before[row], *after[row]]
        texts += [f"{kind}: {prompt.text}" for kind in ("before", "after") for prompt in prompts[row]]
    return captioned_grid(np.stack(images), texts, columns=len(WORDS))


if __name__ == "__main__":
    main()
