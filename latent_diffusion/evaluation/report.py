"""All figures of a comparison: computed, printed and written down."""

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import write_file, write_json
from ..progress import progress
from .extractor import Extractor
from .metrics import count_blocks, frechet_distance, inception_score, kernel_distances, manifold_scores
from .side import Side

# Keys of the figures, in the order of the table, and what they are called there.
FIGURES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "kid": "KID",
    "clip_score": "CLIP score",
}
_SCORE = ("inception_score", "inception_score_deviation")
_MANIFOLD = ("precision", "recall", "density", "coverage")
_KERNEL = ("kid", "kid_standard_error", "kid_subset_size")

# Figures that are printed behind another one, after a plus-minus sign.
SPREADS = {"inception_score": "inception_score_deviation", "kid": "kid_standard_error"}

# What the Frechet distance is called; elsewhere by its name.
DISTANCE_NAMES = {"inception": "FID", "dinov2": "FD-DINOv2"}


@dataclass
class Report:
    """Figures by key, and why others are missing.

    Attributes:
        figures: values.
        missing: a reason by the key of each figure of the table that is not there.
    """

    figures: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, keys: tuple[str, ...], compute: Callable[[], tuple[float, ...]]) -> None:
        """Adds figures; a comparison for which these images do not suffice is missing with the reason."""
        try:
            self.figures |= dict(zip(keys, compute(), strict=True))
        except InputError as error:
            self.missing |= {key: str(error) for key in keys if key in FIGURES}


def compare(reference: Side, samples: Side, wanted: Iterable[str] = FIGURES) -> Report:
    """The figures that the two sides allow.

    Where a side has no features of its images (saved statistics) or too few images, the figures that need them are
    missing, with the reason.

    Args:
        reference: the real images.
        samples: the generated ones.
        wanted: keys; the Frechet distance is always computed, others that come with a wanted one are there too.

    Raises:
        InputError: the Frechet distance cannot be computed, without which there is nothing to report.
    """
    report = Report({"fid": frechet(reference, samples)})
    further = {
        ("sfid",): lambda: (frechet(reference, samples, "spatial"),),
        _SCORE: lambda: inception_score(_logits(samples)),
        _MANIFOLD: lambda: _manifold(*_both(reference, samples)),
        _KERNEL: lambda: _kernel(*_both(reference, samples)),
    }
    for keys, compute in further.items():
        if not set(keys).isdisjoint(wanted):
            report.add(keys, compute)
    return report


def frechet(reference: Side, samples: Side, output: str = "features") -> float:
    """The Frechet distance of one output of the extractor.

    Raises:
        InputError: a side has no such output or fewer than two images.
    """
    sides = []
    for side in (reference, samples):
        found = side.moments(output)
        if found is None:
            raise InputError(f"there are no {output} features of {side.name}")
        sides.append(found)
    return frechet_distance(*sides)


def _features(side: Side, output: str) -> np.ndarray:
    if output not in side.features:
        raise InputError(f"there are no {output} of the images of {side.name}")
    return side.features[output]


def _logits(samples: Side) -> np.ndarray:
    logits = _features(samples, "logits")
    if samples.images is None or not samples.images.grouped:
        return logits
    # Each part of the score must show all classes.
    return logits[np.random.default_rng(0).permutation(len(logits))]


def _both(reference: Side, samples: Side) -> tuple[np.ndarray, np.ndarray]:
    return _features(reference, "features"), _features(samples, "features")


def _manifold(real: np.ndarray, fake: np.ndarray) -> tuple[float, ...]:
    with progress(count_blocks(len(real), len(fake)), "distances", "block") as bar:
        return astuple(manifold_scores(real, fake, on_block=bar.update))


def _kernel(real: np.ndarray, fake: np.ndarray) -> tuple[float, ...]:
    found = kernel_distances(real, fake)
    return found.mean, found.standard_error, found.subset_size


def distance_name(extractor: Extractor) -> str:
    """What the Frechet distance of its features is called."""
    return figure_names(extractor.name)["fid"]


def figure_names(extractor: str) -> dict[str, str]:
    """What figures are called, by key, with the features of the extractor of this name."""
    return FIGURES | {"fid": DISTANCE_NAMES.get(extractor, f"Frechet distance ({extractor})")}


def table(report: Report, reference: Side, samples: Side, extractor: Extractor) -> str:
    """The figures, one a line, why others are missing, and the numbers of images."""
    names = figure_names(extractor.name)
    width = max(len(names[key]) for key in [*report.figures, *report.missing] if key in names)
    lines = []
    for key, name in names.items():
        if key in report.figures:
            lines.append(f"{name:<{width}}  {_shown(key, report.figures)}")
        elif key in report.missing:
            lines.append(f"{name:<{width}}  {'-':>10}  {report.missing[key]}")
    counts = (f"{side.name} {_shown_count(side)}" for side in (reference, samples))
    return "\n".join([*lines, f"{'images':<{width}}  {', '.join(counts)}"])


def _shown(key: str, figures: dict[str, float]) -> str:
    digits = 6 if key == "kid" else 4  # good ones are a thousandth
    text = f"{figures[key]:>10.{digits}f}"
    if key in SPREADS:
        text += f" ± {figures[SPREADS[key]]:.{digits}f}"
    return f"{text} (subsets of {figures['kid_subset_size']})" if key == "kid" else text


def _shown_count(side: Side) -> str:
    if not side.saved:
        return str(side.count)
    saved = f"saved statistics of {side.saved_count or 'an unknown number'}"
    return saved if side.count is None else f"{side.count} and {saved}"


def notes(reference: Side, samples: Side, extractor: Extractor) -> list[str]:
    """What a reader of the figures should know."""
    found = [note for side in (reference, samples) for note in few_images(side.name, side.moments_count, extractor)]
    if reference.images and samples.images and reference.images.size != samples.images.size:
        sizes = ("{}x{}".format(*side.images.size) for side in (reference, samples))
        found.append(
            f"the images of {reference.name} and {samples.name} have {' and '.join(sizes)} pixels; --image-size brings "
            "them to one size"
        )
    return found


def few_images(name: str, count: int | None, extractor: Extractor) -> list[str]:
    """A note where `count` images are too few for the Frechet distance of an extractor's features, or nothing."""
    width = extractor.widths["features"]
    if count is None or count > width:
        return []
    return [
        f"{name} has {count} images, not more than its features have dimensions ({width}): the Frechet distance is too "
        "large; compare it with others of as many images only"
    ]


def write(path: Path, report: Report, reference: Side, samples: Side, extractor: Extractor) -> None:
    """Writes the figures as JSON, with what they were computed from.

    Raises:
        InputError: the file cannot be written.
    """
    sides = {"reference": reference, "samples": samples}
    content = {
        **report.figures,
        "images": {key: side.count for key, side in sides.items()},
        "images_of_saved_statistics": {key: side.saved_count for key, side in sides.items() if side.saved},
        **{key: side.name for key, side in sides.items()},
        "extractor": extractor.identity,
        "not_computed": report.missing,
    }
    write_file(path, lambda temporary: write_json(temporary, content))
