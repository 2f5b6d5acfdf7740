"""Extractors of features by name."""

from pathlib import Path

from ..command_line import ArgumentParser
from ..errors import InputError
from .extractor import Extractor

EXTRACTORS = ("inception", "dinov2", "pixels", "digits-classifier")


def add_extractor_arguments(parser: ArgumentParser) -> None:
    """Adds `--extractor` and `--weights`."""
    add = parser.add_argument
    add(
        "--extractor",
        choices=EXTRACTORS,
        default=EXTRACTORS[0],
        help="features: inception (FID), dinov2 (FD-DINOv2); without weights, for small demonstrations: pixels, "
        "digits-classifier",
    )
    add("--weights", type=Path, help="weights of the extractor; without it they are looked for in pretrained_models")


def make_extractor(name: str, weights: Path | None = None) -> Extractor:
    """The extractor of one of the names `EXTRACTORS`.

    Args:
        name: which one.
        weights: its weights; None looks in the usual places, or where it needs none.

    Raises:
        InputError: no such extractor, weights that are not there or not its own, or weights where it has none.
    """
    if name == "inception":
        from .inception import load_inception

        return load_inception(weights)
    if name == "dinov2":
        from .dinov2 import load_dinov2

        return load_dinov2(weights)
    if name not in EXTRACTORS:
        raise InputError(f"unknown extractor {name!r}; known are {', '.join(EXTRACTORS)}")
    if weights is not None:
        raise InputError(f"the extractor {name} has no weights; leave out {weights}")
    if name == "pixels":
        from .pixels import Pixels

        return Pixels()
    from .digits_classifier import DigitsClassifier

    return DigitsClassifier()
