"""Trains the base pipeline of `make demo-lora` on a folder of digits, which it paints in any color."""

import argparse
from pathlib import Path

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import command


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data-path", type=Path, required=True, help="folder with <digit>/*.png, the training split")
    parser.add_argument("--vae", required=True, help="folder of the autoencoder")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the ppdiffusers pipeline")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    runtime.announce(runtime.start())
    runtime.import_paddlenlp()
    from latent_diffusion.vae import load_vae

    from .colors import in_any_color
    from .digits import load_folder
    from .sdxl_base import train_base

    images, labels = load_folder(arguments.data_path)
    print(f"{len(images)} images", flush=True)
    train_base(in_any_color(images), labels, load_vae(arguments.vae), arguments.output_dir)


if __name__ == "__main__":
    main()
