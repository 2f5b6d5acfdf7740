"""Encodes an ImageNet-style image folder into latents for training, in the fastdit layout.

Run again after an interruption, it continues; the result is the same.
"""

import argparse
from pathlib import Path

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import command


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data-path", "--data_path", type=Path, required=True, help="image folder with one folder a class")
    add(
        "--features-path",
        "--features_path",
        "--feature-path",
        "--feature_path",
        type=Path,
        default=Path("./data/fastdit_imagenet256"),
        help="where imagenet<size>_features and imagenet<size>_labels are made",
    )
    add("--model", help="accepted for fast-DiT's command line; features do not depend on the model")
    add("--image-size", "--image_size", type=int, default=256, help="side of the images in pixels")
    add("--vae", default="stabilityai/sd-vae-ft-mse", help="VAE folder or name on the hub; fast-DiT's mse and ema too")
    add("--batch-size", "--batch_size", type=int, default=16, help="images encoded at a time")
    add("--dtype", choices=["float16", "float32"], default="float32", help="type of the written latents")
    add("--use_flip", "--use-flip", action="store_true", help="also write the latents of the mirrored images")
    add("--global-seed", "--global_seed", "--seed", type=int, default=0, help="seed of the posterior samples")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    print(runtime.start(), flush=True)
    from dit.extraction import ExtractionSettings, extract_features
    from latent_diffusion.vae import load_vae

    vae_name = f"stabilityai/sd-vae-ft-{arguments.vae}" if arguments.vae in ("mse", "ema") else arguments.vae
    settings = ExtractionSettings(
        vae=vae_name,
        resolution=arguments.image_size,
        dtype=arguments.dtype,
        flip=arguments.use_flip,
        seed=arguments.global_seed,
    )
    encoded, total = extract_features(
        arguments.data_path, arguments.features_path, settings, load_vae(vae_name), arguments.batch_size
    )
    print(f"encoded {encoded} images, {total - encoded} were there already, in {arguments.features_path}")


if __name__ == "__main__":
    main()
