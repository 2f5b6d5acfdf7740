"""Encodes an ImageNet-style image folder into features for training: one file an image, or packed.

Run again after an interruption, it continues; the result is the same. Under `python -m paddle.distributed.launch` the
processes share the images.
"""

import argparse
import sys
from pathlib import Path

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import command


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="image folder with one folder a class")
    add(
        "--features-path",
        "--feature-path",
        type=Path,
        default=Path("./data/fastdit_imagenet256"),
        help="folder to write",
    )
    add(
        "--layout",
        choices=["files", "packed"],
        default="files",
        help="files: imagenet<size>_features and imagenet<size>_labels with one file an image, a sample of the VAE's "
        "posterior each; packed: about a hundred files for ImageNet with the moments of the image and of its mirror, "
        "of which training samples anew at every use",
    )
    add("--model", help="accepted for fast-DiT's command line; features do not depend on the model")
    add("--image-size", type=int, default=256, help="side of the images in pixels")
    add("--vae", default="stabilityai/sd-vae-ft-mse", help="VAE folder or name on the hub; fast-DiT's mse and ema too")
    add("--batch-size", type=int, default=16, help="images encoded at a time")
    add("--num-workers", type=int, default=4, help="threads that decode images ahead of the VAE")
    add("--dtype", choices=["float16", "float32"], help="type of the features; files: float32, packed: float16")
    parser.add_switch("--use_flip", help="files: also write the latents of the mirrored images")
    add("--global-seed", "--seed", type=int, default=0, help="files: seed of the posterior samples")
    add(
        "--unreadable",
        choices=["stop", "skip"],
        default="stop",
        help="stop at an image that cannot be read, or name it, skip it and list it in the manifest",
    )
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    runtime.announce(runtime.start())
    from dit.extraction import ExtractionSettings, extract_features
    from latent_diffusion import device
    from latent_diffusion.vae import full_name, load_vae

    device.select(None)
    settings = ExtractionSettings(
        vae=full_name(arguments.vae),
        resolution=arguments.image_size,
        layout=arguments.layout,
        dtype=arguments.dtype,
        flip=arguments.use_flip,
        seed=arguments.global_seed,
    )
    extracted = extract_features(
        arguments.data_path,
        arguments.features_path,
        settings,
        load_vae(arguments.vae),
        arguments.batch_size,
        arguments.num_workers,
        skip_unreadable=arguments.unreadable == "skip",
    )
    if extracted is None:  # rank 0 reports for all
        return
    there = extracted.records - extracted.encoded
    print(f"encoded {extracted.encoded} images, {there} were there already, in {arguments.features_path}")
    if extracted.skipped:
        print(f"note: {len(extracted.skipped)} images were skipped; the manifest lists them", file=sys.stderr)


if __name__ == "__main__":
    main()
