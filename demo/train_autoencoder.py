"""Trains the demo's small autoencoder on a folder of digits and saves it for ppdiffusers."""

import argparse
from pathlib import Path

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import command


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data-path", type=Path, required=True, help="folder with <digit>/*.png, the training split")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the ppdiffusers AutoencoderKL")
    parser.add_argument("--colored", action="store_true", help="train on the digits in many colors, too")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    runtime.announce(runtime.start())
    from .colors import in_many_colors
    from .digits import load_folder

    images, _ = load_folder(arguments.data_path)
    if arguments.colored:
        images = in_many_colors(images)
    print(f"{len(images)} images", flush=True)
    from .autoencoder import COLORED, WHITE, train_autoencoder

    train_autoencoder(images, arguments.output_dir, COLORED if arguments.colored else WHITE)


if __name__ == "__main__":
    main()
