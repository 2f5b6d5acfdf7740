"""Compares ways to sample, by FID and its companions: guidance scales, numbers of steps, samplers, guidance intervals.

Every setting draws images of the same numbers, hence of the same classes or captions and from the same noise. Writes a
row a setting into <output-dir>/sweep.csv and a picture into <output-dir>/sweep.png. Runs in one process or, under
`python -m paddle.distributed.launch`, in several, which share the images. Run again after an interruption, it
continues.
"""

import argparse
import functools
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit.sampling_arguments import (  # noqa: E402
    add_network_arguments,
    check_network_arguments,
    config_file,
    find_checkpoint,
)
from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser, at_least  # noqa: E402
from latent_diffusion.errors import InputError, command  # noqa: E402
from latent_diffusion.evaluation.extractors import add_extractor_arguments  # noqa: E402
from latent_diffusion.evaluation.sweep import COMPARED, Row, Setting, Table, grid  # noqa: E402
from latent_diffusion.guidance import ALL_STEPS, check_interval  # noqa: E402
from latent_diffusion.sampling_arguments import amp_dtype  # noqa: E402

TABLE, PICTURE, FEATURES = "sweep.csv", "sweep.png", "features"


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_network_arguments(parser, vae="ema")
    add = parser.add_argument
    add("--feature-path", type=Path, help="of a U-ViT: features of COCO; images are drawn for the captions of its val")
    add("--reference", type=Path, required=True, help="real images (folder, .npz) or their statistics (.npz)")
    add_extractor_arguments(parser)
    scale = at_least(1, float)
    add("--cfg-scales", type=scale, nargs="+", default=[1.0, 1.5, 2.0, 4.0], help="guidance scales, 1 for none")
    add("--steps", type=at_least(1), nargs="+", default=[50], help="how often the network is called")
    add("--samplers", nargs="+", default=["ddim"], help="ddim, dpm-solver++; of a DiT also ddpm")
    add(
        "--guidance-intervals",
        type=_interval,
        nargs="+",
        metavar="LOW:HIGH",
        default=[ALL_STEPS],
        help="guide at these timesteps only, as shares of the training's: 0 is the image, 1 the noise",
    )
    add("--num-samples", "--num-fid-samples", type=at_least(2), default=10_000, help="images of each setting")
    add(
        "--batch-size",
        "--per-proc-batch-size",
        type=at_least(1),
        default=32,
        help="images that a process samples at a time",
    )
    add("--global-seed", "--seed", type=at_least(0), default=0, help="seed of classes or captions, and noise")
    add("--output-dir", type=Path, default=Path("sweep"), help="folder of table and picture")
    return parser.parse_args()


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LOW:HIGH, as 0.1:0.8, not {text!r}") from None
    return low, high


@command
def main() -> None:
    arguments = parse_arguments()
    check(arguments)
    runtime.announce(runtime.start())
    from latent_diffusion import device, distributed
    from latent_diffusion.evaluation.extractors import make_extractor
    from latent_diffusion.evaluation.side import FeatureWork, open_side
    from latent_diffusion.images import center_crop, crop_then_resize
    from latent_diffusion.settings import claim_folder
    from uvit_ldm.pretrained import holds_uvit

    place = device.select(arguments.device)
    rank, _ = distributed.start()
    extractor = make_extractor(arguments.extractor, arguments.weights)
    settings = grid(arguments.samplers, arguments.steps, arguments.cfg_scales, arguments.guidance_intervals)
    is_uvit = holds_uvit(find_checkpoint(arguments), arguments.use_ema)
    samplers = load_samplers(arguments, settings, is_uvit, place)
    any_sampler = samplers[settings[0]]
    folder = arguments.output_dir
    crop_to = any_sampler.model.config.resolution, crop_then_resize if is_uvit else center_crop
    work = FeatureWork(folder / FEATURES, arguments.batch_size, crop_to=crop_to)
    reference = open_side(arguments.reference, extractor, work)
    if rank == 0:
        shared = common_settings(arguments, any_sampler) | {
            "device": place,
            "extractor": extractor.identity,
            "reference": reference.fingerprint,
        }
        claim_folder(folder, shared, "--output-dir")
    distributed.barrier()
    sweep(samplers, Table(folder / TABLE), reference.extract(), extractor, work, arguments)


def check(arguments: argparse.Namespace) -> None:
    """Raises `InputError` for what can be known to be wrong before the frameworks are imported."""
    check_network_arguments(arguments)
    for interval in arguments.guidance_intervals:
        check_interval(interval)
    if not arguments.reference.exists():
        raise InputError(f"the reference {arguments.reference} does not exist; give --reference images or statistics")


def load_samplers(
    arguments: argparse.Namespace, settings: list[Setting], is_uvit: bool, place: str
) -> dict[Setting, Any]:
    """An `ImageSampler` for each setting, all of one network and one VAE.

    Raises:
        InputError: a setting or a flag does not suit the network, or something cannot be loaded.
    """
    if is_uvit:
        from uvit_ldm import image_sampling, sampling
    else:
        from dit import image_sampling, sampling
    ways = {setting: sampling.make_sampler(setting.sampler, setting.steps) for setting in settings}
    shared = (uvit_parts if is_uvit else dit_parts)(arguments) | {"amp_dtype": amp_dtype(place, arguments.dtype)}
    return {
        setting: image_sampling.ImageSampler(
            sampler=way, guidance_scale=setting.cfg_scale, guidance_interval=setting.interval, **shared
        )
        for setting, way in ways.items()
    }


def dit_parts(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all samplers of a DiT have in common, by attributes of its `ImageSampler`."""
    from dit.image_sampling import load_networks

    if arguments.feature_path is not None:
        raise InputError("--feature-path holds the captions of a U-ViT, and --ckpt is a DiT; leave it out")
    model, vae = load_networks(arguments)
    return {"model": model, "vae": vae}


def uvit_parts(arguments: argparse.Namespace) -> dict[str, Any]:
    """As `dit_parts`, of a U-ViT."""
    from uvit_ldm.features import open_features
    from uvit_ldm.image_sampling import load_networks

    if arguments.feature_path is None:
        raise InputError("--ckpt is a U-ViT: give features of COCO, whose captions it is to draw, by --feature-path")
    for flag in ("image_size", "num_classes", "sd_scale_factor"):
        if getattr(arguments, flag) is not None:
            raise InputError(f"--{flag.replace('_', '-')} is for a DiT, and --ckpt is a U-ViT; leave it out")
    model, vae = load_networks(arguments.ckpt, arguments.vae, config_file(arguments), arguments.use_ema)
    if arguments.enable_flash_attention:
        model.enable_xformers_memory_efficient_attention()
    return {"model": model, "vae": vae, "captions": open_features(arguments.feature_path, model.config, "val")}


def common_settings(arguments: argparse.Namespace, sampler: Any) -> dict[str, Any]:
    """What the images of all rows are a function of, as plain values; weights and captions by their checksums."""
    from latent_diffusion import many_samples

    captions = sampler.captions.settings() if arguments.feature_path else {}
    shared = many_samples.common_settings(sampler, arguments.global_seed, arguments.batch_size)
    return shared | captions | {"num_samples": arguments.num_samples}


def sweep(samplers, table: Table, reference, extractor, work, arguments: argparse.Namespace) -> None:
    """Adds the rows that the table lacks, and draws the picture; all processes of a run call it.

    Args:
        samplers: an `ImageSampler` by `Setting`.
        table: of this sweep.
        reference: the `Side` that images are compared with.
        extractor: of the features.
        work: where features are kept until the row is written, and how many images are drawn at a time.
        arguments: the flags.
    """
    from latent_diffusion import distributed
    from latent_diffusion.evaluation.feature_cache import FeatureCache, extract
    from latent_diffusion.evaluation.report import distance_name
    from latent_diffusion.evaluation.sampled_images import SampledImages
    from latent_diffusion.evaluation.sweep_plot import plot

    rank, _ = distributed.start()
    pending = [setting for setting in samplers if setting not in table]
    for number, setting in enumerate(pending, start=1):
        draw = functools.partial(samplers[setting].draw_samples, arguments.global_seed)
        images = SampledImages(table.path.parent / str(setting), arguments.num_samples, repr(setting), draw)
        features = extract(images, extractor, work.cache, work.batch_size)
        cache = FeatureCache(work.cache, images, extractor)
        if rank == 0:
            # Whichever process has met samples that are not finite has left the features of those out.
            finite = not cache.missing()
            row = measure(setting, features, images.times, reference) if finite else Row.empty(setting)
            table.append(row)
            found = f"{row.fid:.4f}" if finite else "not computed, some samples are not finite"
            print(f"{number}/{len(pending)}: {setting}: {distance_name(extractor)} {found}", flush=True)
        distributed.barrier()  # every process has opened the features
        if rank == 0:
            shutil.rmtree(cache.path)
    if rank == 0:
        picture = table.path.with_name(PICTURE)
        plot(table.rows, distance_name(extractor), picture)
        print(f"wrote {table.path}: {len(table.rows)} settings, {len(pending)} of them new; and {picture}")


def measure(setting: Setting, features, times: list[float], reference) -> Row:
    """The row of a setting: figures of the features of its images, and the median of the times."""
    from latent_diffusion.evaluation.report import compare
    from latent_diffusion.evaluation.side import Side

    figures = compare(reference, Side(str(setting), features), COMPARED).figures
    # There are no times where an interrupted run had drawn all images.
    seconds = statistics.median(times) if times else math.nan
    return Row(setting, *(figures.get(name, math.nan) for name in COMPARED), seconds)


if __name__ == "__main__":
    main()
