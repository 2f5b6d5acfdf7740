"""Features of a set of images on disk: made once, by one process or several, and continued after an interruption.

<cache>/<name of the images>-<key>/
    manifest.json    whose features they are and which extractor made them; the key is a checksum of both
    features.npy     [N, D] float32; spatial.npy and logits.npy where the extractor has them
    done.npy         [N] uint8: 1 where all outputs of an image are written
"""

import hashlib
import math
import tempfile
from pathlib import Path

import numpy as np

from .. import distributed
from ..errors import InputError
from ..extraction import claim_share
from ..files import preparing_folder, write_json
from ..npy import read_header
from ..progress import progress
from ..reading import open_regular
from ..row_files import allocate, write_rows
from .extractor import Extractor
from .image_set import ImageSet
from .npz import SUFFIX

MANIFEST, DONE = "manifest.json", "done.npy"


def extract(images: ImageSet, extractor: Extractor, cache: Path, batch_size: int) -> dict[str, np.ndarray]:
    """The features of all images, from the cache as far as they are there; all processes of a run call it.

    Args:
        images: of which to make features.
        extractor: makes them.
        cache: folder of all caches.
        batch_size: images at a time. Batches have the same members whatever the number of processes.

    Returns:
        Memory-mapped float32 [N, width], by the extractor's names.

    Raises:
        InputError: an image cannot be read, features are not finite, or the cache cannot be written.
    """
    folder = FeatureCache(cache, images, extractor)
    share = claim_share(folder.path, folder.prepare, folder.missing, images.count, batch_size)
    if share.absent:
        name = f"{extractor.name} features of {images.path}{share.note}"
        with progress(sum(map(len, share.pending)), name, "image") as bar:
            for batch, pixels in images.read_ahead(share.pending):
                folder.write(batch, _finite(extractor(pixels), batch, images))
                bar.update(len(batch))
        # After a restart one process may have much work left and another none.
        distributed.barrier(patience=math.inf)
    return folder.read()


def _finite(outputs: dict[str, np.ndarray], batch: range, images: ImageSet) -> dict[str, np.ndarray]:
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise InputError(
                f"the {name} of images {batch.start} to {batch.stop - 1} of {images.path} are not finite: the "
                "extractor's weights are damaged"
            )
    return outputs


class FeatureCache:
    """The folder of the features of one set of images.

    Args:
        cache: folder of all caches.
        images: of which the features are.
        extractor: that makes them.
    """

    def __init__(self, cache: Path, images: ImageSet, extractor: Extractor):
        self._count, self._widths = images.count, extractor.widths
        self._manifest = {
            "images": str(images.path),
            "fingerprint": images.fingerprint,
            "count": images.count,
            "extractor": extractor.identity,
            "widths": extractor.widths,
        }
        key = hashlib.sha256(f"{images.fingerprint} {images.count} {extractor.identity}".encode()).hexdigest()
        self.path = cache / f"{images.path.resolve().name.removesuffix(SUFFIX)}-{key[:16]}"

    def prepare(self) -> None:
        """Makes the folder with files of zeros, unless it is there; for one process of a run."""
        if self.path.is_dir():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=self.path.parent, ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary, "features")
            folder.mkdir()
            write_json(folder / MANIFEST, self._manifest)
            for name, width in self._widths.items():
                allocate(folder / f"{name}.npy", (self._count, width), "float32")
            allocate(folder / DONE, (self._count,), "uint8")
            try:
                folder.rename(self.path)
            except OSError:
                if not self.path.is_dir():  # else another run was quicker, and its folder is filled
                    raise

    def missing(self) -> list[int]:
        """Numbers of the images whose features are not there."""
        return np.flatnonzero(self._open(DONE, (self._count,)) == 0).tolist()

    def write(self, batch: range, outputs: dict[str, np.ndarray]) -> None:
        """Stores what the extractor made of a batch; raises `InputError` where it cannot, as on a full disk."""
        with preparing_folder(self.path):
            for name, values in outputs.items():
                write_rows(self.path / f"{name}.npy", zip(batch, values, strict=True), durable=True)
            write_rows(self.path / DONE, ((number, 1) for number in batch), durable=False)

    def read(self) -> dict[str, np.ndarray]:
        """All outputs, memory-mapped."""
        return {name: self._open(f"{name}.npy", (self._count, width)) for name, width in self._widths.items()}

    def _open(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.path / name
        try:
            with open_regular(path) as file:
                found = read_header(file)
        except (OSError, ValueError):
            found = None
        if found is None or found.shape != shape:
            raise InputError(f"{path} is damaged; remove the folder {self.path} and run again")
        return np.load(path, mmap_mode="r", allow_pickle=False)
