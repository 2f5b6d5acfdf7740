"""Converts features from one file an image to packed ones, or back."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, help="feature folder to read; its checksums are verified")
    add("target", type=Path, help="feature folder to make")
    add("--layout", choices=["packed", "files"], default="packed", help="layout to write; the source is in the other")
    add(
        "--scaling-factor",
        type=float,
        help="what the latents were multiplied by, where the source has no manifest (Stable Diffusion's VAE: 0.18215)",
    )
    add("--global-seed", "--seed", type=int, default=0, help="seed of the samples that files get of packed moments")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    runtime.announce(runtime.start())
    from dit.feature_conversion import convert_features

    converted = convert_features(
        arguments.source, arguments.target, arguments.layout, arguments.scaling_factor, arguments.global_seed
    )
    written = converted.written
    views = "2 views each" if written.views == 2 else "1 view each"
    print(
        f"wrote {arguments.target}: {converted.images} images of {written.resolution} pixels, {views}, "
        f"{written.dtype} {written.content}"
    )
    if converted.read.content != written.content:
        print(f"note: the files hold one sample of each posterior, drawn by seed {written.seed}; it stays the same")


if __name__ == "__main__":
    main()
