"""Writes a trained DiT as a weight file for the official PyTorch code (facebookresearch/DiT, fast-DiT)."""

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
        default=Path("./DiT_XL_2_256"),
        help="DiT pipeline folder of ppdiffusers or diffusers, checkpoint folder, training output folder (its newest "
        "checkpoint), or weight file (.pdparams, .pt, .pth, .bin, .safetensors)",
    )
    add("--config_file", type=Path, help="model configuration, where nothing in or beside the weights tells it")
    add("--output_path", type=Path, default=Path("./DiT-XL-2-256x256.pt"), help="file to write: .pt or .safetensors")
    parser.add_switch("--use_ema", default=True, help="take the averaged weights")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    runtime.announce(runtime.start())
    from dit.official import save_official
    from dit.pretrained import read_pretrained

    pretrained = read_pretrained(arguments.model_file, arguments.config_file, arguments.use_ema)
    print(f"converting {pretrained.source}", flush=True)
    save_official(pretrained.network(), arguments.output_path)
    convention = pretrained.config.timestep_convention
    print(f"wrote {arguments.output_path}; its timestep convention is {convention}")
    if convention != "official":
        print(
            "note: the official code knows only its own timestep frequencies, with which these weights compute "
            "another function; this suite reads the convention from the file"
        )


if __name__ == "__main__":
    main()
