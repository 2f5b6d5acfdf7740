"""Measures how long sampling takes, for each sampler, on the device at hand.

Weights are random: they do not change the time. The VAE is not part of it.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import Table  # noqa: E402
from dit.configuration import DiTConfig  # noqa: E402
from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser, at_least  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402

MODELS = {"cpu": "DiT-S/2", "gpu": "DiT-XL/2"}
STEPS = {"cpu": 10, "gpu": 250}
BATCH_SIZES = {"cpu": 2, "gpu": 8}

# The setting that MindONE publishes a time for, on an Ascend 910*: 250 DDPM steps at 256x256.
PUBLISHED_STEPS = 250


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "gpu"], help="without it the GPU if there is one")
    add("--model", help="published name; without it DiT-S/2 on a CPU and DiT-XL/2 on a GPU")
    add("--image-size", type=at_least(8), default=256, help="side of the images in pixels (default: 256)")
    add("--num-sampling-steps", type=at_least(1), help="steps that are timed; without it 10 on a CPU, 250 on a GPU")
    add("--batch-size", type=at_least(1), help="images at a time; without it 2 on a CPU, 8 on a GPU")
    add("--cfg-scale", type=at_least(1, float), default=4.0, help="guidance scale, 1 for none (default: 4)")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    print(runtime.start(), flush=True)
    from dit.modeling import DiT
    from dit.sampling import SAMPLER_NAMES, make_sampler
    from latent_diffusion import device

    place = device.select(arguments.device)
    name = arguments.model or MODELS[place]
    steps = arguments.num_sampling_steps or STEPS[place]
    batch = arguments.batch_size or BATCH_SIZES[place]
    model = DiT(DiTConfig.from_name(name, arguments.image_size))
    model.eval()

    size = arguments.image_size
    guidance = f"guidance {arguments.cfg_scale:g}"
    title = f"{name} on a {place}, {size}x{size}, batches of {batch}, {guidance}, float32, without the VAE"
    if place == "cpu" and arguments.model is None:
        title += f"\n{name} is a small model, taken because this is a CPU; --model names another"
    published = f"s/image, {PUBLISHED_STEPS} DDPM steps, {size}x{size}"
    columns = ("sampler     ", "steps", "s/step", "s/image", published)
    table = Table("sampling", title, columns, dict.fromkeys(columns[2:], ".3f"))
    _seconds(model, make_sampler("ddim", 1), batch, arguments.cfg_scale)  # the first run is slower
    for sampler_name in SAMPLER_NAMES:
        seconds = _seconds(model, make_sampler(sampler_name, steps), batch, arguments.cfg_scale)
        step, image = seconds / steps, seconds / batch
        # A step costs the same whatever their number.
        table.row(sampler_name, steps, step, image, image / steps * PUBLISHED_STEPS if sampler_name == "ddpm" else None)
    table.write()


def _seconds(model, sampler, batch: int, cfg_scale: float) -> float:
    from dit.sampling import sample_latents

    start = time.perf_counter()
    latents = sample_latents(model, [0] * batch, sampler, cfg_scale)
    latents.numpy()  # waits for a GPU
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
