"""Samples images of classes from a DiT and saves them as one grid."""

import argparse
import os
import time
from pathlib import Path

from dit.sampling_arguments import add_sampling_arguments, check_sampling_arguments
from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser, at_least
from latent_diffusion.errors import InputError, command


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_sampling_arguments(parser, vae="mse", cfg_scale=4.0)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="seed of the noise")
    add("--class-labels", nargs="+", metavar="CLASS", help="numbers or names; without it, eight of the classes")
    add("--id2label", type=Path, help="JSON file of class names by number; ImageNet's when there are 1000 classes")
    add("--output", type=Path, default=Path("sample.png"), help="the picture, a .png file")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    check_sampling_arguments(arguments)
    _check_output(arguments.output)
    runtime.announce(runtime.start())
    from dit.classes import default_labels, parse_labels
    from dit.export import read_labels
    from dit.image_sampling import load_image_sampler
    from dit.sampling import checked_labels
    from latent_diffusion import device
    from latent_diffusion.files import write_file
    from latent_diffusion.images import image_grid
    from latent_diffusion.progress import progress
    from latent_diffusion.sampling import sample_generators

    sampler = load_image_sampler(arguments, device.select(arguments.device))
    classes = sampler.model.config.num_classes
    labels = default_labels(classes)
    if arguments.class_labels:
        labels = parse_labels(arguments.class_labels, read_labels(arguments.id2label, classes))
    checked_labels(labels, classes)
    generators = sample_generators(arguments.seed, range(len(labels)))

    start = time.monotonic()
    with progress(total=sampler.sampler.steps, desc="sampling", unit="step") as bar:
        images = sampler.draw(labels, generators, bar.update)
    seconds = time.monotonic() - start
    grid = image_grid(images, columns=4)
    write_file(arguments.output, lambda path: grid.save(path, format="PNG"))
    print(f"wrote {arguments.output}: {len(labels)} images of classes {labels} in {seconds:.1f} s")


def _check_output(path: Path) -> None:
    # Now, not after minutes of sampling.
    if path.suffix.lower() != ".png" or path.is_dir():
        raise InputError(f"--output {path} is no name of a .png file")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of --output does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write into the folder {path.parent} of --output; choose another folder")


if __name__ == "__main__":
    main()
