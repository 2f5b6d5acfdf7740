"""Writes a trained DiT as a folder for DiTPipeline.from_pretrained of ppdiffusers, or of diffusers (PyTorch)."""

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
        "--model_file",
        type=Path,
        default=Path("./image_generation_dit_output_trainer"),
        help="checkpoint folder, training output folder (its newest checkpoint), weight file of this suite or of the "
        "official code (.pdparams, .pt, .pth, .bin, .safetensors), or DiT pipeline folder of ppdiffusers or diffusers",
    )
    add("--config_file", type=Path, help="model configuration, where nothing in or beside the weights tells it")
    add("--vae_name_or_path", default="stabilityai/sd-vae-ft-mse", help="VAE folder or name on the hub")
    add("--output_path", type=Path, default=Path("./DiT_XL_2_256"), help="folder to write")
    add("--format", choices=("ppdiffusers", "diffusers"), default="ppdiffusers", help="library that is to load it")
    parser.add_switch("--use_ema", default=True, help="take the averaged weights")
    parser.add_switch(
        "--safe_serialization", help="write safetensors in place of model_state.pdparams, as diffusers always has it"
    )
    add("--id2label", type=Path, help="JSON file of class names by id; ImageNet's when there are 1000 classes")
    add(
        "--exact",
        action="store_true",
        help="export a network of the official timestep convention with a transformer class of this project, for "
        "ppdiffusers",
    )
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    runtime.announce(runtime.start())
    from dit.export import export_pipeline, read_labels
    from dit.pretrained import read_pretrained
    from latent_diffusion.files import check_apart

    check_apart(arguments.output_path, arguments.model_file)
    pretrained = read_pretrained(arguments.model_file, arguments.config_file, arguments.use_ema)
    labels = read_labels(arguments.id2label, pretrained.config.num_classes)
    print(f"converting {pretrained.source}", flush=True)
    difference = export_pipeline(
        pretrained.network(),
        arguments.vae_name_or_path,
        arguments.output_path,
        labels,
        arguments.safe_serialization,
        arguments.exact,
        arguments.format,
    )
    print(f"wrote {arguments.output_path}; its output differs from the network's by at most {difference:.1e}")
    if pretrained.config.timestep_convention == "official" and not arguments.exact:
        print(
            f"note: the network has the official timestep convention, the stock transformer class another; their "
            f"outputs differ by {difference:.2g} on a random input (--exact avoids that, for ppdiffusers)"
        )


if __name__ == "__main__":
    main()
