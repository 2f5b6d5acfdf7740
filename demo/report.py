"""What the demo shows at its end: samples of the exported pipeline, loss curve, and a table of figures."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from PIL import Image

from latent_diffusion.checkpoint import MODEL, newest_checkpoint
from latent_diffusion.images import image_grid
from latent_diffusion.progress import progress
from latent_diffusion.weights import read_paddle

from .digits import load_folder
from .judge import Judge, nearest_train_distance

SAMPLES = 500
CLASSES = 10
BATCH_SIZE = 100
INFERENCE_STEPS = 25
GUIDANCE_SCALE = 3.0
LOSSES = ("loss", "mse", "vb")


def draw_samples(pipeline_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Samples `SAMPLES` digits with the exported pipeline, classes in turn.

    Returns:
        Images uint8 [N, 64, 64, 3] and the requested classes int64 [N].
    """
    from ppdiffusers.pipelines.dit.pipeline_dit import DiTPipeline

    pipe = DiTPipeline.from_pretrained(str(pipeline_folder))
    paddle.seed(0)  # on a CPU the pipeline draws from the global generator, whatever it is given
    labels = np.arange(SAMPLES) % CLASSES
    images = []
    pipe.set_progress_bar_config(disable=True)
    with progress(total=SAMPLES, desc="samples", unit="image") as bar:
        for start in range(0, SAMPLES, BATCH_SIZE):
            batch = labels[start : start + BATCH_SIZE].tolist()
            images += pipe(batch, guidance_scale=GUIDANCE_SCALE, num_inference_steps=INFERENCE_STEPS).images
            bar.update(BATCH_SIZE)
    return np.stack([np.asarray(image) for image in images]), labels


def sample_grid(images: np.ndarray, labels: np.ndarray, columns: int = 10) -> Image.Image:
    """A grid of the first `columns` samples of each class, one labelled row a class."""
    rows = [images[labels == digit][:columns] for digit in range(CLASSES)]
    return image_grid(np.concatenate(rows), columns, row_labels=[f"digit {digit}" for digit in range(CLASSES)])


@dataclass(frozen=True)
class Scalar:
    """One curve of the training log: values at steps."""

    steps: list[int]
    values: list[float]

    @property
    def mean(self) -> float:
        """Mean over the logged values."""
        return sum(self.values) / len(self.values)


def read_scalars(output_dir: Path) -> dict[str, Scalar]:
    """The curves that training wrote for VisualDL below `output_dir`."""
    from visualdl import LogReader

    file = max(output_dir.rglob("vdlrecords.*.log"), key=lambda path: path.stat().st_mtime)
    reader = LogReader(file_path=str(file))
    curves = {}
    for name in (*LOSSES, "steps_per_second"):
        records = reader.get_data("scalar", f"train/{name}")
        curves[name] = Scalar([record.id for record in records], [record.value for record in records])
    return curves


def loss_plot(curves: dict[str, Scalar], path: Path) -> None:
    """Draws the loss and its two terms as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in LOSSES:
        axes.plot(curves[name].steps, curves[name].values, label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="DiT on handwritten digits")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def count_parameters(output_dir: Path) -> int:
    """Trained weights in the newest checkpoint of `output_dir`; the fixed positions do not count."""
    weights = read_paddle(newest_checkpoint(output_dir) / MODEL)
    return sum(array.size for name, array in weights.items() if name != "pos_embed")


def judge_samples(images: np.ndarray, labels: np.ndarray, digits: Path) -> dict[str, float]:
    """Figures of merit of the samples, beside those of held-out real digits.

    Returns:
        "real_accuracy" and "class_accuracy" in [0, 1]: of the classifier on held-out digits and on the samples;
        "sample_distance" and "real_distance": mean distance to the nearest training image, for both.
    """
    train_images, train_labels = load_folder(digits / "train")
    real_images, real_labels = load_folder(digits / "val")
    judge = Judge().fit(train_images, train_labels)
    return {
        "real_accuracy": judge.accuracy(real_images, real_labels),
        "class_accuracy": judge.accuracy(images, labels),
        "sample_distance": nearest_train_distance(images, train_images),
        "real_distance": nearest_train_distance(real_images, train_images),
    }
