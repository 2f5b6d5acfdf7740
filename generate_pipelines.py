"""Writes a trained U-ViT as a folder for `LDMTextToImagePipeline.from_pretrained` of ppdiffusers."""

import argparse
import sys
from pathlib import Path

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser, at_least
from latent_diffusion.errors import command
from uvit_ldm.configuration import PIPELINES, STABLE_DIFFUSION, STOCK_PIPELINE


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--model_file",
        type=Path,
        default=Path("./output_dir/uvit_t2i_small_deep"),
        help="checkpoint folder, training output folder (its newest checkpoint), weight file of this suite, of the "
        "official code (.pth) or of PaddleMIX (.pdparams), or pipeline folder",
    )
    add("--output_path", type=Path, default=Path("./ldm_uvit_pipelines"), help="folder to write")
    add(
        "--vae_name_or_path",
        default=f"{STABLE_DIFFUSION}/vae",
        help="VAE: a folder, a CompVis .pth file or a name on the hub",
    )
    add("--unet_config_file", type=Path, help="model configuration, where nothing in or beside the weights tells it")
    add(
        "--text_encoder_name_or_path",
        default=f"{STABLE_DIFFUSION}/text_encoder",
        help="text encoder: a folder or a name on the hub",
    )
    add(
        "--tokenizer_name_or_path",
        default=f"{STABLE_DIFFUSION}/tokenizer",
        help="tokenizer: a folder or a name on the hub",
    )
    add("--model_max_length", type=at_least(1), default=77, help="tokens of a prompt; longer ones are cut off")
    add(
        "--pipeline",
        choices=tuple(PIPELINES),
        default=next(iter(PIPELINES)),
        help="class that is to load the folder; the second needs nothing but ppdiffusers, the first this repository on "
        "Python's path",
    )
    parser.add_switch("--use_ema", default=True, help="of a folder take the averaged weights")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    runtime.announce(runtime.start())
    runtime.import_paddlenlp()
    from paddlenlp.utils.log import logger

    from latent_diffusion.checkpoint import EMA_MODEL, MODEL
    from latent_diffusion.files import check_apart
    from latent_diffusion.text_encoder import TextEncoder
    from uvit_ldm.export import export_pipeline
    from uvit_ldm.pretrained import read_pretrained

    # PaddleNLP names every file it writes, under its temporary name.
    logger.set_level("WARNING")
    model_file = arguments.model_file
    check_apart(arguments.output_path, model_file)
    pretrained = read_pretrained(model_file, arguments.unet_config_file, arguments.use_ema)
    print(f"converting {pretrained.source}", flush=True)
    if model_file.name == MODEL and model_file.with_name(EMA_MODEL).is_file():
        print(
            f"note: {model_file} holds the raw weights; --model_file {model_file.parent} takes the averaged ones",
            file=sys.stderr,
        )
    text_encoder = TextEncoder.load(
        arguments.text_encoder_name_or_path, arguments.tokenizer_name_or_path, arguments.model_max_length
    )
    difference = export_pipeline(
        pretrained.network(), arguments.vae_name_or_path, text_encoder, arguments.output_path, arguments.pipeline
    )
    print(f"wrote {arguments.output_path}; its output differs from the network's by at most {difference:.1e}")
    side = pretrained.config.resolution
    if arguments.pipeline == STOCK_PIPELINE and side != 256:
        print(f"note: call the pipeline with height={side}, width={side}: it takes 256 where nothing is given")


if __name__ == "__main__":
    main()
