"""Measures what token merging (`apply_tome`) saves: seconds per denoising step of guided images, for DiT and U-ViT.

Weights are random: they do not change the time. The VAE is not part of it.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import ROOT, Table  # noqa: E402
from dit.configuration import DiTConfig  # noqa: E402
from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser, at_least  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402
from uvit_ldm.configuration import UViTConfig  # noqa: E402

UVIT_SMALL = ROOT / "config" / "uvit_t2i_small.json"

# Rows of the table; the first is the one that the others are compared with.
ROWS = {
    "none": {"ratio": 0},
    "0.25": {"ratio": 0.25},
    "0.5": {"ratio": 0.5},
    "0.25, MLP too": {"ratio": 0.25, "merge_mlp": True},
    "0.5, MLP too": {"ratio": 0.5, "merge_mlp": True},
}


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "gpu"], help="without it the GPU if there is one")
    add("--dit", default="DiT-S/2", help="published name or JSON file of the DiT")
    add("--uvit", type=Path, default=UVIT_SMALL, help="JSON file of the U-ViT")
    add("--batch-size", type=at_least(1), default=2, help="images at a time; guidance computes each of them twice")
    add("--steps", type=at_least(1), default=10, help="steps that are timed, of which the median counts")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    configurations = DiTConfig.from_name_or_file(arguments.dit), UViTConfig.from_json(arguments.uvit)
    print(runtime.start(), flush=True)
    from dit.modeling import DiT
    from latent_diffusion import device
    from uvit_ldm.modeling import UViT

    place = device.select(arguments.device)
    names = arguments.dit, arguments.uvit.stem
    sizes = " and ".join(f"{name} at {config.resolution}" for name, config in zip(names, configurations, strict=True))
    title = f"{sizes} pixels on a {place}, {arguments.batch_size} guided images, float32, without the VAE"
    columns = [
        measure(make(config), arguments.batch_size, arguments.steps)
        for make, config in zip((DiT, UViT), configurations, strict=True)
    ]
    heads = [head.format(name) for name in names for head in ("{}, s/step", "{}, speed-up")]
    formats = {head: ".2f" if "speed-up" in head else ".3f" for head in heads}
    table = Table("token-merging", title, ("tokens merged", *heads), formats)
    for row, name in enumerate(ROWS):
        table.row(name, *(cell for seconds in columns for cell in (seconds[row], seconds[0] / seconds[row])))
    table.write()


def measure(model, batch: int, steps: int) -> list[float]:
    """Seconds per step for each of `ROWS`, in turn, so that all meet the same load of the machine."""
    model.eval()
    inputs = _inputs(model.config, 2 * batch)
    seconds = [[_step(model.apply_tome(**row), inputs) for row in ROWS.values()] for _ in range(1 + steps)]
    return np.median(seconds[1:], axis=0).tolist()  # the first step is slower


def _inputs(config, count: int) -> list:
    """Random latents, a timestep of each, and classes or encoded prompts."""
    import paddle

    if isinstance(config, UViTConfig):
        condition = paddle.randn([count, *config.context_shape])
    else:
        condition = paddle.randint(config.num_classes, shape=[count])
    return [paddle.randn([count, *config.latent_shape]), paddle.full([count], 500), condition]


def _step(model, inputs: list) -> float:
    import paddle

    start = time.perf_counter()
    with paddle.no_grad():
        model(*inputs).numpy()  # waits for a GPU
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
