"""Class labels: dropped in training; numbers, names or the default ones in sampling."""

import difflib
from collections.abc import Sequence

import numpy as np

from latent_diffusion.errors import InputError

from .configuration import DiTConfig

# The ImageNet classes of the official sample: golden retriever, otter, lesser panda, geyser, macaw, valley, balloon,
# Arctic fox.
WELL_KNOWN = [207, 360, 387, 974, 88, 979, 417, 279]


def draw_label(label: int, config: DiTConfig, rng: np.random.Generator) -> np.int64:
    """The label, or the null class with probability `class_dropout_prob` (for guidance: arXiv 2207.12598)."""
    return np.int64(config.num_classes if rng.random() < config.class_dropout_prob else label)


def default_labels(num_classes: int) -> list[int]:
    """The well-known eight of 1000 classes; else eight (or all) spread over the classes."""
    return WELL_KNOWN if num_classes == 1000 else spread_classes(num_classes, len(WELL_KNOWN))


def spread_classes(num_classes: int, count: int) -> list[int]:
    """`count` classes (or all, where there are fewer), evenly spread over [0, num_classes)."""
    return np.linspace(0, num_classes - 1, min(count, num_classes)).astype("int64").tolist()


def parse_labels(words: Sequence[str], names: dict[int, str] | None) -> list[int]:
    """The class number of each word, which is a number or a name.

    Args:
        words: numbers are not checked to be classes.
        names: by class number; a name may list synonyms ("tench, Tinca tinca"), each of which names the class.

    Raises:
        InputError: a name is unknown or means several classes.
    """
    meanings: dict[str, list[int]] = {}
    for label, text in (names or {}).items():
        for name in {text.lower(), *text.lower().split(", ")}:
            meanings.setdefault(name, []).append(label)
    return [int(word) if _is_number(word) else _named(word, meanings) for word in words]


def _is_number(word: str) -> bool:
    return word.removeprefix("-").isdecimal()


def _named(word: str, meanings: dict[str, list[int]]) -> int:
    found = meanings.get(word.lower(), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"the class name {word!r} means {' and '.join(map(str, found))}; give the number")
    if not meanings:
        raise InputError(f"the class {word!r} is a name, but this model's classes have none; give --id2label FILE")
    close = difflib.get_close_matches(word.lower(), meanings)
    hint = f"; similar ones are {', '.join(close)}" if close else "; give its number"
    raise InputError(f"the class name {word!r} is unknown{hint}")
