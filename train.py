"""Trains a DiT with a plain loop, on extracted features or on images. Flags can also come from a YAML file (-c)."""

import argparse
from pathlib import Path

from latent_diffusion import profiling, runtime
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import command
from latent_diffusion.evaluation.flags import add_evaluation_arguments
from latent_diffusion.progress import outlive_lost_lines


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_config()
    add = parser.add_argument
    add("--model", "--model-name", default="DiT-XL/2", help="DiT-XL/2 to DiT-S/8, or a config/*.json file")
    add("--image-size", type=int, help="side of the images in pixels (default: the configuration's, or 256)")
    add("--num-classes", type=int, help="number of classes (default: the configuration's, or 1000)")
    add(
        "--feature-path",
        "--features-path",
        type=Path,
        default=Path("./data/fastdit_imagenet256"),
        help="features of extract_features.py, of either layout",
    )
    parser.add_switch("--use-flip", help="take mirrored latents half of the time, where there is a file of each")
    add("--data-path", type=Path, help="train on images in place of features: a folder a class, or tar shards")
    add("--vae", "--vae-checkpoint", default="mse", help="mse, ema, a folder or a name on the hub; for images")
    add("--init-from", "--dit-checkpoint", type=Path, help="start from pretrained weights, of any known format")
    add("--results-dir", "--output-path", type=Path, default=Path("results"), help="where experiments are numbered")
    add(
        "--resume",
        type=_resume,
        nargs="?",
        const="true",
        help="continue a checkpoint or experiment folder; without a value, the newest experiment of the model",
    )
    add("--epochs", type=int, default=1400, help="passes over the data, unless --max-steps is given")
    add("--max-steps", type=int, help="optimizer steps in all")
    add("--global-batch-size", type=int, default=256, help="samples of one step, over all processes")
    add("--global-seed", "--seed", type=int, default=0, help="of weights, order, flips, timesteps and noise")
    add("--lr", type=float, default=1e-4, help="learning rate of AdamW")
    add("--weight-decay", type=float, default=0.0, help="of AdamW")
    add("--warmup-steps", type=int, default=0, help="steps over which the learning rate rises")
    add("--ema-decay", type=float, default=0.9999, help="decay of the averaged weights")
    parser.add_switch("--recompute", help="recompute activations in the backward pass")
    add("--amp", type=_amp, choices=["off", "fp16", "bf16"], default="off", help="mixed precision; a CPU has no fp16")
    add("--num-workers", type=int, default=4, help="processes that read data")
    add("--log-every", type=int, default=100, help="steps between log lines")
    add("--ckpt-every", type=int, default=50_000, help="steps between checkpoints")
    add("--max-run-hours", type=float, help="save and end after so many hours; --resume goes on from there")
    add(
        "--on-nonfinite",
        choices=["stop", "skip"],
        default="stop",
        help="at a loss or gradient that is not finite: stop, or skip that step",
    )
    add_evaluation_arguments(parser)
    parser.add_switch("--profile", help=profiling.HELP)
    add("--device", choices=["cpu", "gpu"], help="default: the GPU where there is one")
    parser.add_switch("--use-parallel", help="of MindONE's command line: insist on several processes")
    return parser.parse_args()


def _resume(text: str) -> Path | bool:
    """A folder, or whether to continue the newest experiment."""
    return {"true": True, "false": False}.get(text.lower(), Path(text))


def _amp(text: str) -> str:
    # YAML reads a bare "off" as false.
    return "off" if text.lower() == "false" else text


@command
def main() -> None:
    args = parse_arguments()
    runtime.announce(runtime.start())
    from dit.loop import train

    outlive_lost_lines()
    train(args)


if __name__ == "__main__":
    main()
