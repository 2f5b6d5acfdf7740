"""Encodes COCO's images and captions into features for text-to-image training: one file each, or packed.

Run again after an interruption, it continues; the result is the same. Under `python -m paddle.distributed.launch` the
processes share the work.
"""

import argparse
import sys
from pathlib import Path

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser, at_least
from latent_diffusion.errors import command
from uvit_ldm.configuration import STABLE_DIFFUSION


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--images-path", type=Path, required=True, help="folder of the images, such as COCO's train2014")
    add("--captions-file", type=Path, required=True, help="JSON as COCO's captions_train2014.json")
    add("--split", choices=["train", "val"], default="train", help="folder of the features in --features-path")
    add(
        "--features-path",
        "--feature-path",
        type=Path,
        default=Path("./data/coco256_features"),
        help="folder to write; both splits go into one",
    )
    add(
        "--layout",
        choices=["files", "packed"],
        default="files",
        help="files: <i>.npy for an image and <i>_<k>.npy for each of its captions, as U-ViT's own code; packed: about "
        "forty files for COCO",
    )
    add("--image-size", type=int, default=256, help="side of the images in pixels")
    add(
        "--vae_name_or_path",
        default=f"{STABLE_DIFFUSION}/vae",
        help="VAE: a folder, a CompVis .pth file or a name on the hub",
    )
    add("--text_encoder_name_or_path", default=f"{STABLE_DIFFUSION}/text_encoder", help="its folder or name on the hub")
    add("--tokenizer_name_or_path", default=f"{STABLE_DIFFUSION}/tokenizer", help="its folder or name on the hub")
    add("--model_max_length", type=at_least(1), default=77, help="tokens of a caption; longer ones are cut off")
    add("--batch-size", type=int, default=16, help="images, then captions, encoded at a time")
    add("--num-workers", type=int, default=4, help="threads that decode images ahead of the VAE")
    add("--dtype", choices=["float16", "float32"], help="type of the features; files: float32, packed: float16")
    add(
        "--unreadable",
        choices=["stop", "skip"],
        default="stop",
        help="stop at an image that cannot be read; or look at all of them first, name those, leave them out of the "
        "numbering and list them in the manifest",
    )
    add("--prompts", type=Path, help="text file with one prompt a line, which training draws images of")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    runtime.announce(runtime.start())
    from latent_diffusion import device
    from latent_diffusion.text_encoder import TextEncoder
    from latent_diffusion.vae import full_name, load_vae
    from uvit_ldm.captions import read_captions, read_prompts_file
    from uvit_ldm.extraction import ExtractionSettings, extract_features, write_prompts

    images = read_captions(arguments.captions_file)
    prompts = read_prompts_file(arguments.prompts) if arguments.prompts else []
    device.select(None)
    settings = ExtractionSettings(
        vae=full_name(arguments.vae_name_or_path),
        text_encoder=arguments.text_encoder_name_or_path,
        tokenizer=arguments.tokenizer_name_or_path,
        resolution=arguments.image_size,
        layout=arguments.layout,
        dtype=arguments.dtype,
    )
    encoder = TextEncoder.load(
        arguments.text_encoder_name_or_path, arguments.tokenizer_name_or_path, arguments.model_max_length
    )
    if prompts and runtime.is_first_process():
        write_prompts(arguments.features_path, prompts, encoder)
    extracted = extract_features(
        arguments.images_path,
        images,
        arguments.features_path,
        arguments.split,
        settings,
        load_vae(arguments.vae_name_or_path),
        encoder,
        arguments.batch_size,
        arguments.num_workers,
        skip_unreadable=arguments.unreadable == "skip",
    )
    if extracted is None:  # rank 0 reports for all
        return
    of_images, of_captions = extracted
    print(
        f"encoded {of_images.encoded} images and {of_captions.encoded} captions, "
        f"{of_images.records - of_images.encoded} and {of_captions.records - of_captions.encoded} were there already, "
        f"in {arguments.features_path}"
    )
    if of_images.skipped:
        print(f"note: {len(of_images.skipped)} images were skipped; the manifest lists them", file=sys.stderr)


if __name__ == "__main__":
    main()
