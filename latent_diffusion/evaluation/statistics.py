"""Files of saved statistics: mean and covariance of features, as ADM's reference files and pytorch-fid's have them.

An `.npz` with "mu" [D] and "sigma" [D, D] of the features and, in ADM's, "mu_s" and "sigma_s" of the spatial ones.
Those that this suite writes also say which extractor made them ("extractor") and of how many images ("count").
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import write_file
from .extractor import Extractor
from .metrics import Moments

# The arrays of an output's mean and covariance.
KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Statistics:
    """What a file holds.

    Attributes:
        moments: by the extractor's names of outputs.
        count: of how many images; None where the file does not say.
    """

    moments: dict[str, Moments]
    count: int | None


def has_statistics(path: Path) -> bool:
    """Whether a file is an `.npz` with a mean; one with images may have it as well."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            return KEYS["features"][0] in file.files
    except Exception:  # damaged: whoever reads it as images says how
        return False


def read_statistics(path: Path, extractor: Extractor) -> Statistics:
    """Reads a file.

    Args:
        path: an `.npz`.
        extractor: that the statistics are to be compared with.

    Raises:
        InputError: the file is damaged, or of features of another extractor.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            known = {key for keys in KEYS.values() for key in keys} | {"count", "extractor"}
            arrays = {name: file[name] for name in file.files if name in known}
    except Exception as error:  # a damaged archive can make NumPy raise anything
        raise InputError(f"cannot read the statistics {path}: {' '.join(str(error).split())}") from None
    made_by = str(arrays.get("extractor", extractor.identity))
    if made_by != extractor.identity:
        raise InputError(f"the statistics {path} were made by {made_by}, not by {extractor.identity}; make them again")
    moments = {
        name: _moments(path, arrays, mean, covariance, extractor.widths[name])
        for name, (mean, covariance) in KEYS.items()
        if mean in arrays and name in extractor.widths
    }
    return Statistics(moments, int(arrays["count"]) if "count" in arrays else None)


def _moments(path: Path, arrays: dict[str, np.ndarray], mean: str, covariance: str, width: int) -> Moments:
    for name, shape in ((mean, (width,)), (covariance, (width, width))):
        if name not in arrays:
            raise InputError(f"{path} has {mean} and no {name}; statistics need both")
        if arrays[name].shape != shape or arrays[name].dtype.kind != "f":
            raise InputError(
                f"{name} in {path} is {arrays[name].dtype} {list(arrays[name].shape)}, but the extractor's is "
                f"{list(shape)}: the file is of another one (--extractor)"
            )
        if not np.isfinite(arrays[name]).all():
            raise InputError(f"{name} in {path} holds values that are not finite; make the file again")
    return Moments(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64))


def write_statistics(path: Path, extractor: Extractor, moments: dict[str, Moments], count: int | None) -> None:
    """Writes a file that `read_statistics` reads, and ADM's and pytorch-fid's programs do.

    Args:
        path: ends in `.npz`; it appears when it is complete.
        extractor: that made the features.
        moments: by the extractor's names of outputs.
        count: of how many images.

    Raises:
        InputError: its folder cannot be made or written.
    """
    arrays = {"extractor": np.array(extractor.identity)} | ({} if count is None else {"count": np.array(count)})
    for name, value in moments.items():
        mean, covariance = KEYS[name]
        arrays |= {mean: value.mean, covariance: value.covariance}
    write_file(path, lambda temporary: _save(temporary, arrays))


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # given a path, NumPy would add another suffix
        np.savez(file, **arrays)
