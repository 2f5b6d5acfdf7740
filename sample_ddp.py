"""Samples many images for evaluation: a folder of PNG files, and an .npz file for ADM's evaluator.

Runs in one process or, under `python -m paddle.distributed.launch`, in several; the images are the same. Run again
after an interruption, it continues.
"""

import argparse

from dit.configuration import DiTConfig
from dit.sampling_arguments import add_sampling_arguments, check_sampling_arguments, model_name
from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser, at_least
from latent_diffusion.errors import command
from latent_diffusion.sampling_arguments import add_many_samples_arguments, samples_name, set_tf32


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_sampling_arguments(parser, vae="ema", cfg_scale=1.5)
    add_many_samples_arguments(parser)
    add = parser.add_argument
    add("--num-fid-samples", type=at_least(1), default=50_000, help="number of images")
    add("--global-seed", "--seed", type=at_least(0), default=0, help="seed of classes and noise")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    check_sampling_arguments(arguments)
    set_tf32(arguments.tf32)
    runtime.announce(runtime.start())
    from dit.image_sampling import load_image_sampler
    from latent_diffusion import device, many_samples
    from latent_diffusion.sample_folder import SampleFolder

    place = device.select(arguments.device)
    sampler = load_image_sampler(arguments, place)
    folder = SampleFolder(
        arguments.sample_dir / _folder_name(arguments, sampler.model.config), arguments.num_fid_samples
    )
    device_settings = {"device": place, "tf32": place == "gpu" and arguments.tf32}
    many_samples.sample(folder, sampler, arguments.global_seed, arguments.per_proc_batch_size, device_settings)


def _folder_name(arguments: argparse.Namespace, config: DiTConfig) -> str:
    model = model_name(config).replace("/", "-")
    ckpt = arguments.ckpt.absolute().name.removesuffix(".pt") if arguments.ckpt else "pretrained"
    return samples_name(f"{model}-{ckpt}", config.resolution, arguments.vae, arguments)


if __name__ == "__main__":
    main()
