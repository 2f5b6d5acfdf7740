"""Files of saved statistics: mean and covariance of features, as ADM's reference files and pytorch-fid's have them.

An `.npz` with "mu" [D] and "sigma" [D, D] of the features and, in ADM's, "mu_s" and "sigma_s" of the spatial ones.
Those that this suite writes also say which extractor made them ("extractor") and of how many images ("count").
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import write_file
from .extractor import Extractor
from .metrics import Moments
from .npz import array_header, array_names, is_npz, read_array

# The arrays of an output's mean and covariance.
KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}

# Bytes of one: more than the name of an extractor takes.
LONGEST_VALUE = 1024


@dataclass(frozen=True)
class Statistics:
    """What a file holds.

    Attributes:
        moments: by the extractor's names of outputs.
        count: of how many images; None where the file does not say.
        fingerprint: a checksum of the moments.
    """

    moments: dict[str, Moments]
    count: int | None
    fingerprint: str


def has_statistics(path: Path) -> bool:
    """Whether a file is an `.npz` with a mean; one with images may have it as well.

    Raises:
        InputError: it is an `.npz` that cannot be read.
    """
    return is_npz(path) and KEYS["features"][0] in array_names(path)


def read_statistics(path: Path, extractor: Extractor) -> Statistics:
    """Reads a file.

    Args:
        path: an `.npz`.
        extractor: that the statistics are to be compared with.

    Raises:
        InputError: the file is damaged, or of features of another extractor.
    """
    names = array_names(path)
    if "extractor" in names:
        _check_header(path, "extractor", (), "U")
        made_by = str(read_array(path, "extractor"))
        if made_by != extractor.identity:
            raise InputError(
                f"the statistics {path} were made by {made_by}, not by {extractor.identity}; make them again"
            )
    count = None
    if "count" in names:
        _check_header(path, "count", (), "iu")
        count = int(read_array(path, "count"))
    found = {
        output: _read_moments(path, mean, covariance, extractor.widths[output])
        for output, (mean, covariance) in KEYS.items()
        if mean in names and output in extractor.widths
    }
    digest = hashlib.sha256(extractor.identity.encode())
    for value in found.values():
        digest.update(value.mean.tobytes() + value.covariance.tobytes())
    return Statistics(found, count, digest.hexdigest())


def _read_moments(path: Path, mean: str, covariance: str, width: int) -> Moments:
    arrays = []
    for name, shape in ((mean, (width,)), (covariance, (width, width))):
        _check_header(path, name, shape, "f")
        values = read_array(path, name).astype(np.float64)
        if not np.isfinite(values).all():
            raise InputError(f"{name} in {path} holds values that are not finite; make the file again")
        arrays.append(values)
    return Moments(*arrays)


def _check_header(path: Path, name: str, shape: tuple[int, ...], kinds: str) -> None:
    """Before anything is read, so that a small file cannot claim much memory."""
    header = array_header(path, name)
    if header.shape != shape or header.dtype.kind not in kinds or header.dtype.itemsize > LONGEST_VALUE:
        raise InputError(
            f"{name} in {path} is {header}, where {list(shape)} was expected: the file is damaged or of another "
            "extractor"
        )


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
