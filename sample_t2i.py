"""Samples images of many prompts with a U-ViT, for evaluation.

Writes a folder of PNG files, an .npz file of them and a .prompts.txt file with the prompt of each, one a line:
evaluate.py --samples, --prompts. Runs in one process or, under `python -m paddle.distributed.launch`, in several; the
images are the same. Run again after an interruption, it continues.
"""

import argparse
from pathlib import Path

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser, at_least
from latent_diffusion.errors import InputError, command
from latent_diffusion.files import write_file
from latent_diffusion.guidance import check_interval
from latent_diffusion.sampling_arguments import (
    add_device_arguments,
    add_guidance_arguments,
    add_many_samples_arguments,
    amp_dtype,
    samples_name,
    set_tf32,
)
from uvit_ldm.captions import choose_captions, read_captions, read_prompts_file
from uvit_ldm.configuration import STABLE_DIFFUSION, UViTConfig

# What a component is without its flag.
OWN = f"without it that of the pipeline folder, else of {STABLE_DIFFUSION}"


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_config()
    add = parser.add_argument
    add(
        "--ckpt",
        "--model_file",
        type=Path,
        required=True,
        help="weights: checkpoint or training folder, official .pth file or <step>.ckpt folder, pipeline folder",
    )
    add("--model", "--unet_config_file", type=Path, help="config/uvit_*.json, for weights that nothing describes")
    parser.add_switch("--use-ema", default=True, help="take the averaged weights of a checkpoint that has both")
    add("--vae", "--vae_name_or_path", help=f"a folder, a CompVis .pth file or a name on the hub; {OWN}")
    add("--text_encoder_name_or_path", help=f"a folder or a name on the hub; {OWN}")
    add("--tokenizer_name_or_path", help=f"a folder or a name on the hub; {OWN}")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, help="text file with one prompt a line: sample i is of line i")
    source.add_argument(
        "--captions-file",
        type=Path,
        help="JSON as COCO's captions_val2014.json: samples are of its images in random order, of one caption each",
    )
    add(
        "--num-fid-samples",
        type=at_least(1),
        help="number of images, without it that of the prompts; after the last prompt they begin anew",
    )
    add("--sampler", default="ddim", help="ddim or dpm-solver++")
    add("--num-sampling-steps", type=at_least(1), default=50, help="how often the network is called")
    add_guidance_arguments(parser, cfg_scale=2.0)
    add("--global-seed", "--seed", type=at_least(0), default=0, help="seed of noise and of the choice of captions")
    add_many_samples_arguments(parser)
    add_device_arguments(parser)
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    check(arguments)
    prompts = read_prompts(arguments)
    set_tf32(arguments.tf32)
    runtime.announce(runtime.start())
    from latent_diffusion import device, many_samples
    from latent_diffusion.sample_folder import SampleFolder

    place = device.select(arguments.device)
    name_parts(arguments)
    sampler = load_image_sampler(arguments, prompts, place)
    folder = SampleFolder(
        arguments.sample_dir / folder_name(arguments, sampler.model.config), arguments.num_fid_samples or len(prompts)
    )
    further = sampler.captions.settings() | {"device": place, "tf32": place == "gpu" and arguments.tf32}
    many_samples.sample(folder, sampler, arguments.global_seed, arguments.per_proc_batch_size, further)
    if runtime.is_first_process():
        lines = "".join(f"{prompt}\n" for prompt in sampler.captions.of_samples(folder.count))
        target = folder.path.with_name(f"{folder.path.name}.prompts.txt")
        write_file(target, lambda path: path.write_text(lines, encoding="utf-8"))
        print(f"wrote {target}")


def check(arguments: argparse.Namespace) -> None:
    """Raises `InputError` for what can be known to be wrong before the frameworks are imported."""
    check_interval(arguments.guidance_interval)
    if not arguments.ckpt.exists():
        raise InputError(f"found no weights at {arguments.ckpt}; name them with --ckpt")
    if arguments.model is not None:
        UViTConfig.from_json(arguments.model)


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of `--prompts` or `--captions-file`, each in one line.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    if arguments.prompts is not None:
        return read_prompts_file(arguments.prompts)
    return choose_captions(read_captions(arguments.captions_file), arguments.global_seed)


def name_parts(arguments: argparse.Namespace) -> None:
    """Fills in VAE, text encoder and tokenizer where no flag names them."""
    from uvit_ldm.pretrained import other_parts

    flags = ("vae", "text_encoder_name_or_path", "tokenizer_name_or_path")
    for flag, own in zip(flags, other_parts(arguments.ckpt), strict=True):
        setattr(arguments, flag, getattr(arguments, flag) or own)


def load_image_sampler(arguments: argparse.Namespace, prompts: list[str], place: str):
    """The `ImageSampler` of the prompts that the flags name; its captions are `Prompts`.

    Raises:
        InputError: something is not there, cannot be read, or does not belong together.
    """
    from uvit_ldm.image_sampling import ImageSampler, load_networks
    from uvit_ldm.prompts import Prompts, load_encoder
    from uvit_ldm.sampling import make_sampler

    way = make_sampler(arguments.sampler, arguments.num_sampling_steps)
    model, vae = load_networks(arguments.ckpt, arguments.vae, arguments.model, arguments.use_ema)
    if arguments.enable_flash_attention:
        model.enable_xformers_memory_efficient_attention()
    encoder = load_encoder(arguments.text_encoder_name_or_path, arguments.tokenizer_name_or_path, model.config)
    return ImageSampler(
        model=model,
        vae=vae,
        sampler=way,
        guidance_scale=arguments.cfg_scale,
        captions=Prompts(prompts, encoder),
        guidance_interval=tuple(arguments.guidance_interval),
        amp_dtype=amp_dtype(place, arguments.dtype),
    )


def folder_name(arguments: argparse.Namespace, config: UViTConfig) -> str:
    model = f"UViT-{config.num_layers}x{config.hidden_size}-{config.patch_size}"
    ckpt = arguments.ckpt.absolute().name.removesuffix(".pth")
    prompts = (arguments.prompts or arguments.captions_file).stem
    return samples_name(f"{model}-{ckpt}-prompts-{prompts}", config.resolution, arguments.vae, arguments)


if __name__ == "__main__":
    main()
