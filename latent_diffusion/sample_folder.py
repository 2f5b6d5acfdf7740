"""A folder of sampled images, which grows over interruptions, and the archive that evaluators read.

<folder>/000000.png  000001.png  ...
<folder>/settings.json   what the images were made with
<folder>.npz             "arr_0", uint8 [N, H, W, 3]: what ADM's evaluator takes (openai/guided-diffusion)
"""

import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import InputError
from .files import preparing_folder, replace_file
from .images import open_image
from .settings import claim_folder

# Seconds between two looks at what the other processes have written.
POLL_INTERVAL = 1.0


class SampleFolder:
    """The images 0 to `count` - 1 in `path`; each appears under its name only when it is complete.

    Args:
        path: the folder; `prepare` makes it.
        count: how many images are wanted.
    """

    def __init__(self, path: Path, count: int):
        self.path, self.count = path, count

    def prepare(self, settings: dict[str, Any]) -> None:
        """Makes the folder, or checks that it was made with the same settings; for one process of a run.

        Raises:
            InputError: it was made with other settings, or holds something else, or images beyond those wanted, or
                cannot be written.
        """
        claim_folder(self.path, settings, "--sample-dir")
        with preparing_folder(self.path):
            for path in self.path.glob(".*.tmp"):
                path.unlink()  # what an interrupted run was writing
        wanted = {self._file(index).name for index in range(self.count)}
        if others := sorted({path.name for path in self.path.glob("*.png")} - wanted):
            raise InputError(
                f"{self.path} holds {others[0]} ({len(others)} such), which is not among the {self.count} images "
                "asked for; ask for more or remove it"
            )

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of `indices` that are wanted and not there yet."""
        return [index for index in indices if index < self.count and not self._file(index).exists()]

    def save(self, index: int, image: np.ndarray) -> None:
        """Writes one image, uint8 [H, W, 3]."""
        replace_file(self._file(index), lambda path: Image.fromarray(image).save(path, format="PNG"))

    def finished(self) -> int:
        """How many images are there."""
        return sum(1 for _ in self.path.glob("*.png"))

    def wait(self, on_look: Callable[[], object]) -> None:
        """Returns when all images are there, whichever process writes them; `on_look` is called at each look.

        Looks at the folder, since processes may finish further apart than a barrier waits.
        """
        while self.finished() < self.count:
            on_look()
            time.sleep(POLL_INTERVAL)
        on_look()

    def write_npz(self) -> Path:
        """Writes all images into `<folder>.npz`, one at a time, and returns its path.

        Raises:
            InputError: an image cannot be read or has another size than the first.
        """
        target = self.path.with_name(f"{self.path.name}.npz")
        replace_file(target, self._write_archive)
        return target

    def _write_archive(self, path: Path) -> None:
        shape = self._read(0).shape
        # As `numpy.savez` writes it, which would need all images at once.
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *shape)}
            np.lib.format.write_array_header_1_0(stream, header)
            for index in range(self.count):
                image = self._read(index)
                if image.shape != shape:
                    raise InputError(f"{self._file(index)} has the shape {image.shape}, the first image {shape}")
                stream.write(image.tobytes())

    def _read(self, index: int) -> np.ndarray:
        try:
            with open_image(self._file(index)) as image:
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # a damaged file can make Pillow raise anything
            raise InputError(f"cannot read {self._file(index)}: {error}; remove it and run again") from None

    def _file(self, index: int) -> Path:
        return self.path / f"{index:06d}.png"
