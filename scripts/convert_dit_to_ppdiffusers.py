"""Writes a trained DiT as a ppdiffusers pipeline folder for DiTPipeline.from_pretrained."""

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
        help="checkpoint folder, training output folder (its newest checkpoint), .pdparams file or official .pt file",
    )
    add("--config_file", type=Path, help="model configuration; taken from the checkpoint where it is there")
    add("--vae_name_or_path", default="stabilityai/sd-vae-ft-mse", help="VAE folder or name on the hub")
    add("--output_path", type=Path, default=Path("./DiT_XL_2_256"), help="folder to write")
    add("--use_ema", type=_boolean, nargs="?", const=True, default=True, help="take the averaged weights")
    add(
        "--safe_serialization",
        type=_boolean,
        nargs="?",
        const=True,
        default=False,
        help="write safetensors in place of model_state.pdparams",
    )
    add("--id2label", type=Path, help="JSON file of class names by id; ImageNet's when there are 1000 classes")
    add(
        "--exact",
        action="store_true",
        help="export a network of the official timestep convention with a transformer class of this project",
    )
    return parser.parse_args()


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


@command
def main() -> None:
    arguments = parse_arguments()
    print(runtime.start(), flush=True)
    from dit.export import export_pipeline, find_config, find_weights, load_network, read_labels

    weights_file = find_weights(arguments.model_file, arguments.use_ema)
    config = find_config(weights_file, arguments.config_file)
    labels = read_labels(arguments.id2label, config.num_classes)
    print(f"converting {weights_file}", flush=True)
    difference = export_pipeline(
        load_network(weights_file, config),
        arguments.vae_name_or_path,
        arguments.output_path,
        labels,
        arguments.safe_serialization,
        arguments.exact,
    )
    print(f"wrote {arguments.output_path}; its output differs from the network's by at most {difference:.1e}")
    if config.timestep_convention == "official" and not arguments.exact:
        print(
            f"note: the network has the official timestep convention, the stock transformer class another; their "
            f"outputs differ by {difference:.2g} on a random input (--exact avoids that)"
        )


if __name__ == "__main__":
    main()
