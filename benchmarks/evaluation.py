"""Measures evaluation on the device at hand: features of the FID Inception, beside PyTorch's, and figures of features.

Weights, images and features are random: they do not change the time.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import scratch  # noqa: E402
from benchmarks.report import ROOT, Table, write  # noqa: E402
from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.command_line import ArgumentParser, at_least  # noqa: E402
from latent_diffusion.errors import InputError, command  # noqa: E402

PEER_SCRIPT = ROOT / "benchmarks" / "peers" / "inception_torch.py"

WIDTH, CLASSES = 2048, 1008


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "gpu"], help="without it the GPU if there is one")
    add("--image-size", type=at_least(1), default=256, help="side of the images in pixels")
    add("--batch-size", type=at_least(1), default=32, help="images at a time")
    add("--rounds", type=at_least(1), default=3, help="how often both are timed, in turn; the best counts")
    add(
        "--peer",
        default=os.environ.get("PEER_PYTHON"),
        help="Python interpreter with PyTorch, for its rate on the same CPU; without it what PEER_PYTHON names",
    )
    add("--features", type=at_least(2), default=50_000, help="images a side of which the FID is computed")
    add("--images", type=at_least(10), default=10_000, help="images a side of which the other figures are computed")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse_arguments()
    print(runtime.start(), flush=True)
    from latent_diffusion import device

    place = device.select(arguments.device)
    size = arguments.image_size
    print(f"on a {place}, {os.cpu_count()} CPU cores, float32")
    features = measure_features(
        arguments.batch_size, size, arguments.rounds, arguments.peer if place == "cpu" else None
    )
    figures = measure_figures(arguments.features, arguments.images)
    write("evaluation", {"tables": [features.content(), figures.content()]})


def measure_features(batch_size: int, size: int, rounds: int, peer: str | None) -> Table:
    """Images a second from uint8 images to features, in turn with PyTorch so that both meet the same load."""
    from latent_diffusion.evaluation.inception import Inception, InceptionNetwork

    network = InceptionNetwork()
    extractor = Inception(network)
    images = np.random.default_rng(0).integers(0, 256, [batch_size, size, size, 3], dtype=np.uint8)
    extractor(images)  # the first batch is slower
    rates = []
    with scratch() as folder:
        if peer:
            write_inputs(Path(folder), network, images)
        for _ in range(rounds):
            own = batch_size / seconds(lambda: extractor(images))
            rates.append([own, *(peer_rates(peer, Path(folder)) if peer else [])])
    best = np.max(rates, axis=0)  # other processes only ever slow it down
    names = ("this suite", "PyTorch, channels first", "PyTorch, channels last")
    title = f"features: FID Inception, {size}x{size} pixels, batches of {batch_size}"
    columns = ("computed by".ljust(len(names[1])), "images/s", "rate of this suite to it")
    table = Table("features", title, columns, dict(zip(columns[1:], (".1f", ".2f"), strict=True)))
    for name, rate in zip(names, best.tolist(), strict=False):
        table.row(name, rate, best[0].item() / rate)
    return table


def write_inputs(folder: Path, network, images: np.ndarray) -> None:
    from latent_diffusion.weights import transpose_linear

    np.savez(folder / "weights.npz", **transpose_linear({n: t.numpy() for n, t in network.state_dict().items()}))
    np.save(folder / "images.npy", images)


def peer_rates(interpreter: str, folder: Path) -> list[float]:
    """What PyTorch reaches with the same images, network and number of threads: channels first, and last."""
    arguments = [interpreter, PEER_SCRIPT, "rate", folder / "weights.npz", folder / "images.npy"]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"--peer {interpreter} cannot be run: {error.strerror}") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:]
        raise InputError(
            f"{interpreter} {PEER_SCRIPT.name} ended with exit status {done.returncode}: {''.join(reason)}"
        )
    return [float(rate) for rate in done.stdout.split()]


def measure_figures(features: int, images: int) -> Table:
    """Seconds that each figure takes when the features are there."""
    from latent_diffusion.evaluation import metrics

    rng = np.random.default_rng(0)
    real, fake = (rng.standard_normal([max(features, images), WIDTH], np.float32) for _ in range(2))
    logits = rng.standard_normal([images, CLASSES], np.float32)
    figures = {
        "FID": (features, lambda a, b: metrics.frechet_distance(metrics.moments(a), metrics.moments(b))),
        "KID": (images, metrics.kernel_distances),
        "precision, recall, density, coverage": (images, metrics.manifold_scores),
        "Inception Score": (images, lambda a, b: metrics.inception_score(logits)),
    }
    title = f"figures: features of {WIDTH} dimensions, the same number of images on both sides"
    columns = ("figure".ljust(max(map(len, figures))), "images a side", "seconds")
    table = Table("figures", title, columns, {"seconds": ".1f"})
    for name, (count, compute) in figures.items():
        table.row(name, count, seconds(lambda compute=compute, count=count: compute(real[:count], fake[:count])))
    return table


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
