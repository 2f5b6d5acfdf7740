"""Compares images with a reference: FID, sFID, Inception Score, precision, recall, density, coverage and KID.

Either side is a folder of images, an .npz file of images (as sample_ddp.py and ADM's scripts write) or a file of saved
statistics. Runs in one process or, under `python -m paddle.distributed.launch`, in several, which share the images. Run
again after an interruption, it continues.
"""

import argparse
import sys
from pathlib import Path

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser, at_least
from latent_diffusion.errors import InputError, command
from latent_diffusion.evaluation.extractors import add_extractor_arguments

# How images are cropped: as DiT's features are, and as U-ViT's.
CROPS = ("adm", "uvit")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_config()
    add = parser.add_argument
    add("--reference", type=Path, required=True, help="real images, or their statistics")
    add("--samples", type=Path, help="generated images, or their statistics")
    add_extractor_arguments(parser)
    add("--clip", help="a CLIP model, a folder or a name on the hub: adds the CLIP score of the samples for --prompts")
    add(
        "--prompts",
        type=Path,
        help="text file with the prompt of each sample, one a line, in the order of the files' "
        "names (as numbers where all are numbers)",
    )
    add("--image-size", type=at_least(8), help="bring all images to this many pixels; without it they stay as they are")
    add("--crop", choices=CROPS, default="adm", help="how --image-size crops: as for DiT's features or for U-ViT's")
    add("--batch-size", type=at_least(1), default=32, help="images that a process takes at a time")
    add("--num-workers", type=at_least(1), default=4, help="threads that decode images")
    add("--cache", type=Path, default=Path("evaluation_cache"), help="folder where features are kept")
    add("--save-statistics", type=Path, metavar="NPZ", help="write the reference's statistics into this file")
    add("--output", type=Path, metavar="JSON", help="without it <samples>.<extractor>.json")
    add("--device", choices=["cpu", "gpu"], help="without it the GPU if there is one")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Raises `InputError` for flags that do not fit together, and for files that cannot be."""
    if arguments.samples is None and arguments.save_statistics is None:
        raise InputError("nothing to do: give --samples, or --save-statistics to store the reference")
    if (arguments.clip is None) != (arguments.prompts is None):
        raise InputError("--clip and --prompts belong together: the CLIP score compares each sample with its prompt")
    if arguments.clip is not None and arguments.samples is None:
        raise InputError("--clip needs --samples")
    inputs = list(filter(None, (arguments.reference, arguments.samples, arguments.prompts, arguments.weights)))
    for path in inputs:
        if not path.exists():
            raise InputError(f"{path} does not exist")
    for flag, path, suffix in (
        ("--save-statistics", arguments.save_statistics, ".npz"),
        ("--output", arguments.output, ".json"),
    ):
        if path is not None and (path.suffix != suffix or path.is_dir()):
            raise InputError(f"{flag} {path} must be the name of a file that ends in {suffix}")
        if path is not None and path.resolve() in [other.resolve() for other in inputs]:
            raise InputError(f"{flag} {path} would replace what it is computed from; give another name")


def output_file(arguments: argparse.Namespace) -> Path:
    """Where the figures are written."""
    if arguments.output is not None:
        return arguments.output
    samples = arguments.samples if arguments.samples.name not in ("", "..") else arguments.samples.resolve()
    return samples.with_name(f"{samples.name.removesuffix('.npz')}.{arguments.extractor}.json")


@command
def main() -> None:
    arguments = parse_arguments()
    check(arguments)
    runtime.announce(runtime.start())
    from latent_diffusion import device, distributed
    from latent_diffusion.evaluation import report
    from latent_diffusion.evaluation.extractors import make_extractor
    from latent_diffusion.evaluation.feature_cache import extract
    from latent_diffusion.evaluation.side import FeatureWork, open_side, save_statistics

    device.select(arguments.device)
    rank, _ = distributed.start()
    extractor = make_extractor(arguments.extractor, arguments.weights)
    work = FeatureWork(arguments.cache, arguments.batch_size, arguments.num_workers, crop_to(arguments))
    reference = open_side(arguments.reference, extractor, work)
    samples = open_side(arguments.samples, extractor, work) if arguments.samples else None
    scorer, prompts = open_clip(arguments, samples) if arguments.clip else (None, [])
    # What can be wrong with either side has been said; now comes the work.
    for side in filter(None, (reference, samples)):
        side.extract()
    embeddings = extract(samples.images, scorer, work.cache, work.batch_size)["features"] if scorer else None
    if rank > 0:  # rank 0 computes and reports for all
        return
    if arguments.save_statistics:
        save_statistics(arguments.save_statistics, extractor, reference)
        print(f"wrote {arguments.save_statistics}")
    if samples is None:
        return
    found = report.compare(reference, samples)
    if scorer:
        found.figures["clip_score"] = float(scorer.score(embeddings, prompts).mean())
    print(report.table(found, reference, samples, extractor))
    for note in report.notes(reference, samples, extractor):
        print(f"note: {note}", file=sys.stderr)
    output = output_file(arguments)
    report.write(output, found, reference, samples, extractor)
    print(f"wrote {output}")


def crop_to(arguments: argparse.Namespace):
    """Size and function of `--image-size` and `--crop`."""
    from latent_diffusion.images import center_crop, crop_then_resize

    if arguments.image_size is None:
        return None
    return arguments.image_size, {"adm": center_crop, "uvit": crop_then_resize}[arguments.crop]


def open_clip(arguments: argparse.Namespace, samples) -> tuple:
    """The scorer of `--clip` and the prompts of the samples.

    Raises:
        InputError: the CLIP or the prompts cannot be read, or there are no images or not as many prompts.
    """
    from latent_diffusion.evaluation.clip_score import CLIPScorer
    from latent_diffusion.files import read_lines

    if samples.images is None:
        raise InputError(f"{samples.name} holds no images; the CLIP score needs them")
    prompts = read_lines(arguments.prompts)
    if len(prompts) != samples.images.count:
        raise InputError(
            f"{arguments.prompts} has {len(prompts)} lines and {samples.name} {samples.images.count} images; write the "
            "prompt of each image in a line, in the images' order"
        )
    return CLIPScorer.load(arguments.clip), prompts


if __name__ == "__main__":
    main()
