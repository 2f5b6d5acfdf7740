"""Samples many images for evaluation: a folder of PNG files, and an .npz file for ADM's evaluator.

Runs in one process or, under `python -m paddle.distributed.launch`, in several; the images are the same. Run again
after an interruption, it continues.
"""

import argparse
import os
from pathlib import Path

from dit.configuration import DiTConfig
from dit.sampling_arguments import add_sampling_arguments, check_sampling_arguments, model_name
from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser, at_least
from latent_diffusion.errors import command


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_sampling_arguments(parser, vae="ema", cfg_scale=1.5)
    add = parser.add_argument
    add("--sample-dir", type=Path, default=Path("samples"), help="where the folder of this run is made")
    add("--per-proc-batch-size", type=at_least(1), default=32, help="images that a process samples at a time")
    add("--num-fid-samples", type=at_least(1), default=50_000, help="number of images")
    add("--global-seed", "--seed", type=at_least(0), default=0, help="seed of classes and noise")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="let a GPU multiply in TF32")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    check_sampling_arguments(arguments)
    if not arguments.tf32:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # NVIDIA's libraries read it when they are loaded
    tuning = runtime.start()
    from dit import many_samples
    from dit.image_sampling import load_image_sampler
    from latent_diffusion import device, distributed
    from latent_diffusion.sample_folder import SampleFolder

    place = device.select(arguments.device)
    rank, world_size = distributed.start()
    sampler = load_image_sampler(arguments, place)
    folder = SampleFolder(
        arguments.sample_dir / _folder_name(arguments, sampler.model.config), arguments.num_fid_samples
    )
    seed, batch_size = arguments.global_seed, arguments.per_proc_batch_size
    if rank == 0:
        print(f"{tuning}\nsampling into {folder.path}, processes: {world_size}", flush=True)
        tf32 = place == "gpu" and arguments.tf32
        folder.prepare(many_samples.settings(sampler, seed, batch_size) | {"device": place, "tf32": tf32})
    distributed.barrier()
    many_samples.fill(folder, sampler, seed, batch_size, rank, world_size)
    if rank == 0:
        print(f"wrote {folder.count} images to {folder.path} and {folder.write_npz()}")


def _folder_name(arguments: argparse.Namespace, config: DiTConfig) -> str:
    """As the script of facebookresearch/DiT names it."""
    model = model_name(config).replace("/", "-")
    ckpt = arguments.ckpt.absolute().name.removesuffix(".pt") if arguments.ckpt else "pretrained"
    vae = Path(arguments.vae).absolute().name
    return f"{model}-{ckpt}-size-{config.resolution}-vae-{vae}-cfg-{arguments.cfg_scale}-seed-{arguments.global_seed}"


if __name__ == "__main__":
    main()
