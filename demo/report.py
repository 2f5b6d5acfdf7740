"""What the demos show at their end: a grid of samples, loss curves, and figures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latent_diffusion.checkpoint import MODEL, newest_checkpoint
from latent_diffusion.evaluation import report as evaluation
from latent_diffusion.evaluation.digits_classifier import DigitsClassifier
from latent_diffusion.evaluation.side import Side
from latent_diffusion.files import write_json
from latent_diffusion.images import image_grid
from latent_diffusion.weights import read_paddle

from .digits import load_folder
from .judge import Judge, nearest_train_distance


def sample_grid(images: np.ndarray, labels: np.ndarray, columns: int = 10) -> Image.Image:
    """A grid of the first `columns` samples of each class, one labelled row a class."""
    digits = np.unique(labels)
    rows = [images[labels == digit][:columns] for digit in digits]
    return image_grid(np.concatenate(rows), columns, row_labels=[f"digit {digit}" for digit in digits])


@dataclass(frozen=True)
class Scalar:
    """One curve of the training log: values at steps."""

    steps: list[int]
    values: list[float]

    @property
    def mean(self) -> float:
        """Mean over the logged values."""
        return sum(self.values) / len(self.values)


def read_scalars(output_dir: Path, losses: Sequence[str]) -> dict[str, Scalar]:
    """The curves that training wrote for VisualDL below `output_dir`: the losses, and "steps_per_second"."""
    from visualdl import LogReader

    file = max(output_dir.rglob("vdlrecords.*.log"), key=lambda path: path.stat().st_mtime)
    reader = LogReader(file_path=str(file))
    curves = {}
    for name in (*losses, "steps_per_second"):
        records = reader.get_data("scalar", f"train/{name}")
        curves[name] = Scalar([record.id for record in records], [record.value for record in records])
    return curves


def loss_plot(curves: dict[str, Scalar], losses: Sequence[str], title: str, path: Path) -> None:
    """Draws the curves of the losses as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in losses:
        axes.plot(curves[name].steps, curves[name].values, label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def count_parameters(output_dir: Path, fixed: Iterable[str] = ()) -> int:
    """Trained weights in the newest checkpoint of `output_dir`; the `fixed` ones do not count."""
    weights = read_paddle(newest_checkpoint(output_dir) / MODEL)
    return sum(array.size for name, array in weights.items() if name not in fixed)


def judge_samples(images: np.ndarray, labels: np.ndarray, digits: Path) -> tuple[dict[str, float], np.ndarray]:
    """Figures of merit of the samples, beside those of held-out real digits, and which samples are right.

    Returns:
        "real_accuracy" and "class_accuracy" in [0, 1]: of the classifier on held-out digits and on the samples;
        "sample_distance" and "real_distance": mean distance to the nearest training image, for both.
        And bool `[N]`: whether a sample is read as the digit in `labels`.
    """
    train_images, train_labels = load_folder(digits / "train")
    real_images, real_labels = load_folder(digits / "val")
    judge = Judge().fit(train_images, train_labels)
    right = judge.read(images) == labels
    figures = {
        "real_accuracy": judge.accuracy(real_images, real_labels),
        "class_accuracy": float(right.mean()),
        "sample_distance": nearest_train_distance(images, train_images),
        "real_distance": nearest_train_distance(real_images, train_images),
    }
    return figures, right


def comparison(judged: dict[str, float]) -> dict[str, str]:
    """The rows of a demo's table that compare samples with real digits."""
    return {
        "accuracy on held-out real digits": f"{judged['real_accuracy']:.1%}",
        "distance to nearest training image": f"{judged['sample_distance']:.3f}",
        "the same for held-out real digits": f"{judged['real_distance']:.3f}",
    }


def set_figures(images: np.ndarray, digits: Path) -> dict[str, dict[str, float]]:
    """The figures of `evaluate.py`, with the features of its digits classifier and the training digits as reference.

    Returns:
        Under "samples" those of the samples, uint8 `[N, H, W, 3]`, under "held_out" those of held-out real digits. Both
        sets are of one size, since the figures depend on it: the smaller of the two, members drawn at random.
    """
    extractor = DigitsClassifier()
    reference = Side("training digits", extractor(load_folder(digits / "train")[0]))
    sets = {"samples": images, "held_out": load_folder(digits / "val")[0]}
    count = min(map(len, sets.values()))
    rng = np.random.default_rng(0)
    chosen = {name: rng.permutation(members)[:count] for name, members in sets.items()}
    return {
        name: evaluation.compare(reference, Side(name, extractor(members))).figures | {"images": count}
        for name, members in chosen.items()
    }


def write_figures(path: Path, judged: dict[str, float], images: np.ndarray, digits: Path) -> None:
    """Prints the figures of the set of samples, and writes them with those of `judge_samples` as JSON."""
    sets = set_figures(images, digits)
    print(set_table(sets))
    write_json(path, judged | {"sets": sets})


def set_table(figures: dict[str, dict[str, float]]) -> str:
    """What `set_figures` found, in two columns."""
    samples, held_out = figures["samples"], figures["held_out"]
    names = evaluation.figure_names(DigitsClassifier.name)
    rows = [(name, samples[key], held_out[key]) for key, name in names.items() if key in samples]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"  {name:<{width}}  {ours:>8.3f}  {real:>8.3f}" for name, ours, real in rows]
    title = f"\n  against the training digits, {samples['images']} images of each:"
    return "\n".join([title, f"  {'':<{width}}  {'samples':>8}  held-out real digits", *lines])
