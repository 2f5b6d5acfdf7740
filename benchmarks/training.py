"""Measures training: recompute x mixed precision x features or images -> steps/s, images/s and peak memory.

Each row is one run of train.py, whose last log line gives the figures; the steps before it warm up. Data and weights
are random: they do not change the time.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import (  # noqa: E402
    STABLE_DIFFUSION_CHANNELS,
    last_figures,
    random_vae,
    scratch,
    write_features,
    write_images,
)
from benchmarks.report import ROOT, Table  # noqa: E402
from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402

# (model, image size, global batch size)
DEFAULTS = {"cpu": ("DiT-S/2", 128, 8), "gpu": ("DiT-XL/2", 256, 128)}
PRECISIONS = {"cpu": ["off"], "gpu": ["off", "fp16", "bf16"]}


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "gpu"], help="without it the GPU if there is one")
    add("--model", help="without it DiT-S/2 on a CPU and DiT-XL/2 on a GPU")
    add("--image-size", type=int, help="without it 128 on a CPU and 256 on a GPU")
    add("--global-batch-size", type=int, help="without it 8 on a CPU and 128 on a GPU")
    add("--steps", type=int, default=5, help="steps to measure, after as many to warm up (default: 5)")
    add("--num-workers", type=int, default=2, help="processes that read data (default: 2)")
    add("--vae", help="VAE folder; without it a new one of the shape of Stable Diffusion's")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    runtime.start()
    from latent_diffusion import device

    place = device.select(arguments.device)
    model, image_size, batch = DEFAULTS[place]
    note = ""
    if place == "cpu" and arguments.model is None:
        note = f"on a CPU {model} at {image_size} pixels is taken, not DiT-XL/2 at 256, in float32\n"
    model, image_size = arguments.model or model, arguments.image_size or image_size
    batch = arguments.global_batch_size or batch
    title = f"{note}{model}, {image_size} pixels, global batch {batch}, one process on a {place}"
    with scratch() as folder:
        folder = Path(folder)
        write_features(folder / "features", image_size, 4 * batch)
        write_images(folder / "images", 4 * batch)
        if arguments.vae is None:
            random_vae(STABLE_DIFFUSION_CHANNELS).save_pretrained(str(folder / "vae"), safe_serialization=False)
        vae = arguments.vae or folder / "vae"
        sources = {
            "yes": ("--feature-path", "features"),
            "no": ("--data-path", "images", "--vae", Path(vae).absolute()),
        }
        # The runs are in another folder than this one.
        named = Path(model).absolute() if model.endswith(".json") else model
        flags = ("--model", named, "--image-size", image_size, "--global-batch-size", batch, "--device", place)
        flags += ("--max-steps", 2 * arguments.steps, "--log-every", arguments.steps, "--ckpt-every", 10**9)
        flags += ("--num-workers", arguments.num_workers)
        columns = ("recompute", "mixed precision", "feature pre-extraction", "steps/s", "images/s", "peak memory (MB)")
        table = Table("training", title, columns, {"peak memory (MB)": ".0f"})
        for pre_extracted, source in sources.items():
            for precision in PRECISIONS[place]:
                for recompute in (False, True):
                    own = ("--amp", precision, "--recompute", recompute)
                    figures = last_figures([ROOT / "train.py", *flags, *source, *own], folder)
                    table.row(
                        "yes" if recompute else "no",
                        precision,
                        pre_extracted,
                        figures["steps_per_second"],
                        figures["samples_per_second"],
                        figures["peak_memory_gib"] * 1024,
                    )
    table.write()


if __name__ == "__main__":
    main()
