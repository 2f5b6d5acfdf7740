"""The flags `--eval_*` that all training commands have. Needs no Paddle."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..command_line import ArgumentParser
from ..errors import InputError
from .extractors import EXTRACTORS

# More than Inception's features have dimensions (2048), below which distances are far too large, and few enough to be
# drawn often.
SAMPLES = 5000

HELP = {
    "steps": "steps between evaluations of EMA samples; the last step is evaluated, too, and the best weights are kept",
    "samples": "images of an evaluation",
    "reference": "what they are compared with: a folder or .npz of images, or an .npz of saved statistics",
    "extractor": f"features of the comparison: {', '.join(EXTRACTORS)}",
    "weights": "weights of the extractor; without it they are looked for in pretrained_models",
}


@dataclass(frozen=True)
class EvaluationFlags:
    """What the flags say.

    Attributes:
        steps: between two evaluations; None for none.
        samples: images of an evaluation.
        reference: what they are compared with, see `open_side`.
        extractor: name of the features.
        weights: the extractor's, see `make_extractor`.

    Raises:
        InputError: values that cannot be, steps without a reference or a reference without steps, no such reference.
    """

    steps: int | None
    samples: int
    reference: Path | None
    extractor: str
    weights: Path | None

    def __post_init__(self):
        if (self.steps is None) != (self.reference is None):
            raise InputError("--eval_steps and --eval_reference belong together: give both or neither")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--eval_steps must be at least 1, not {self.steps}")
        if self.reference is not None and not self.reference.exists():
            raise InputError(f"--eval_reference {self.reference} does not exist")
        if self.samples < 2:
            raise InputError(f"--eval_samples must be at least 2, not {self.samples}")


def add_evaluation_arguments(parser: ArgumentParser) -> None:
    """Adds them to a command line; `evaluation_flags` reads them."""
    add = parser.add_argument
    add("--eval-steps", type=int, help=HELP["steps"])
    add("--eval-samples", type=int, default=SAMPLES, help=HELP["samples"])
    add("--eval-reference", type=Path, help=HELP["reference"])
    add("--eval-extractor", choices=EXTRACTORS, default=EXTRACTORS[0], help=HELP["extractor"])
    add("--eval-weights", type=Path, help=HELP["weights"])


def evaluation_flags(arguments: argparse.Namespace) -> EvaluationFlags:
    """What the command line says.

    Raises:
        InputError: see `EvaluationFlags`.
    """
    return EvaluationFlags(
        arguments.eval_steps,
        arguments.eval_samples,
        arguments.eval_reference,
        arguments.eval_extractor,
        arguments.eval_weights,
    )
