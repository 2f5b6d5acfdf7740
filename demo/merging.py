"""What token merging does to the pictures: the share of digits that are still recognized, for both demos' pipelines.

To be run after `make demo` and `make demo-t2i`.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import InputError, command

from .captions import HELD_OUT, TRAINING, make_prompts
from .digits import load_folder
from .judge import Judge

RATIOS = (0.0, 0.25, 0.5)


def recognized(
    digit_pipeline, ratio: float, conditions: Sequence, digits: np.ndarray, judge: Judge
) -> tuple[float, float]:
    """Draws with merged tokens.

    Args:
        digit_pipeline: a `DigitPipeline`; it is left without merging.
        ratio: share of the image tokens that is merged.
        conditions: what to draw, N of them.
        digits: what the samples should show, int `[N]`.

    Returns:
        The share, 0..1, of samples that are read as their digit, and seconds per image.
    """
    from latent_diffusion.token_merging import apply_tome, remove_tome

    apply_tome(digit_pipeline.pipe, ratio=ratio)
    start = time.perf_counter()
    images = digit_pipeline.draw(conditions)
    seconds = time.perf_counter() - start
    remove_tome(digit_pipeline.pipe)
    return judge.accuracy(images, digits), seconds / len(conditions)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--dit", type=Path, default=Path("output/demo/DiT_digits"), help="pipeline folder of make demo")
    add("--uvit", type=Path, default=Path("output/demo-t2i/uvit_digits"), help="pipeline folder of make demo-t2i")
    add("--data-path", type=Path, default=Path("data/demo-t2i/images/train"), help="digits that the judge learns from")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    for folder in (arguments.dit, arguments.uvit):
        if not folder.is_dir():
            raise InputError(f"the pipeline folder {folder} does not exist; run make demo and make demo-t2i first")
    judge = Judge().fit(*load_folder(arguments.data_path))
    runtime.announce(runtime.start())
    from .pipelines import load_dit, load_text_to_image

    prompts = make_prompts(TRAINING) + make_prompts(HELD_OUT)
    digits = np.array([prompt.digit for prompt in prompts])
    subjects = [
        (load_dit(arguments.dit), digits.tolist()),
        (load_text_to_image(arguments.uvit), [prompt.text for prompt in prompts]),
    ]
    rows = [[recognized(pipe, ratio, conditions, digits, judge) for pipe, conditions in subjects] for ratio in RATIOS]
    print(f"{len(prompts)} samples; digits recognized, seconds per image")
    print("| tokens merged | DiT           | U-ViT         |")
    print("| ------------- | ------------- | ------------- |")
    for ratio, cells in zip(RATIOS, rows, strict=True):
        shown = " | ".join(f"{share:6.1%}, {seconds:.3f}" for share, seconds in cells)
        print(f"| {ratio:<13} | {shown} |")


if __name__ == "__main__":
    main()
