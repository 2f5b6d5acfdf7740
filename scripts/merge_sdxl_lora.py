"""Writes a Stable Diffusion XL pipeline with a LoRA merged in, for StableDiffusionXLPipeline.from_pretrained."""

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
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="the pipeline that the LoRA was trained with: a folder of ppdiffusers or diffusers, or a name on the hub",
    )
    add("--lora_path", type=Path, required=True, help="the LoRA: its file, or the folder that holds it")
    add("--output_path", type=Path, required=True, help="folder to write")
    add("--vae_name", help="VAE folder or name on the hub, in place of the pipeline's own")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    runtime.announce(runtime.start())
    from sdxl_lora.export import merge_pipeline

    merge_pipeline(
        arguments.pretrained_model_name_or_path, arguments.lora_path, arguments.output_path, arguments.vae_name
    )
    print(f"wrote {arguments.output_path}")


if __name__ == "__main__":
    main()
