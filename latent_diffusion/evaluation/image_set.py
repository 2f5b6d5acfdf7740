"""Images to be evaluated, by index: a folder of them, or the archive that `sample_ddp.py` and ADM's scripts write."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError
from ..extraction import ImageSource
from ..files import in_order
from ..images import EXTENSIONS, MAX_PIXELS, Crop, images_below, open_image
from ..reading import naming_errors
from .npz import SUFFIX, array_header, opened_array

ARRAY = "arr_0"


class ImageSet(ABC):
    """Images of one size.

    Attributes:
        path: where they are.
        count: how many there are.
        fingerprint: a short text that changes when they do.
        size: width and height of each.
        grouped: whether they lie in several folders, as one a class: neighbors in the order are alike.
    """

    path: Path
    count: int
    fingerprint: str
    size: tuple[int, int]
    grouped = False

    @abstractmethod
    def read_ahead(self, batches: list[range]) -> Iterator[tuple[range, np.ndarray]]:
        """Yields each batch of indices with its images uint8 [B, H, W, 3].

        Args:
            batches: ranges of indices, ascending.

        Raises:
            InputError: an image cannot be read, or has another size than the first.
        """


def open_images(path: Path, crop_to: tuple[int, Crop] | None = None, workers: int = 4) -> ImageSet:
    """The images at `path`: a folder with images at any depth, or an `.npz` file with `arr_0` uint8 [N, H, W, 3].

    Args:
        path: either.
        crop_to: the side in pixels that images are brought to, and by which function; None leaves them as they are.
        workers: threads that decode the images of a folder.

    Raises:
        InputError: there is no such thing, or it holds no images.
    """
    with naming_errors(path):
        if path.is_dir():
            return ImageFolder(path, crop_to, workers)
        if path.suffix == SUFFIX and path.is_file():
            return ImageArchive(path, crop_to)
        kind = "is no folder of images and no .npz file" if path.exists() else "does not exist"
    raise InputError(f"{path} {kind}; give a folder of images, an .npz with {ARRAY}, or a file of saved statistics")


class ImageFolder(ImageSet):
    """The images below a folder, in the order of `image_files`."""

    def __init__(self, path: Path, crop_to: tuple[int, Crop] | None, workers: int):
        files = image_files(path)
        self.path, self.count = path, len(files)
        self.grouped = len({file.parent for file in files}) > 1
        names = [file.relative_to(path) for file in files]
        self.size = (crop_to[0], crop_to[0]) if crop_to else _size(files[0])
        self.fingerprint = _digest(path, _crop_name(crop_to), *(_stamp(path / name, name) for name in names))
        size, crop = crop_to or (0, self._uncropped)
        self._source = ImageSource(path, names, size, crop, workers)

    def read_ahead(self, batches: list[range]) -> Iterator[tuple[range, np.ndarray]]:
        for batch, images, _ in self._source.read_ahead(batches):
            yield batch, images

    def _uncropped(self, image: Image.Image, _: int) -> np.ndarray:
        if image.size != self.size:
            (width, height), (first_width, first_height) = image.size, self.size
            raise ValueError(
                f"it has {width}x{height} pixels, the first one {first_width}x{first_height}; bring them to one size "
                "(--image-size)"
            )
        return np.asarray(image)


def _size(path: Path) -> tuple[int, int]:
    try:
        with open_image(path) as image:
            return image.size
    except Exception as error:  # a damaged file can make Pillow raise anything
        raise InputError(f"cannot read the image {path}: {' '.join(str(error).split())}") from None


def image_files(folder: Path) -> list[Path]:
    """The images below a folder: by number where all names are numbers, else by folder and name.

    Raises:
        InputError: there are none.
    """
    files = images_below(folder)
    if not files:
        raise InputError(f"the folder {folder} holds no images ({', '.join(EXTENSIONS)})")
    if all(file.parent == folder for file in files):
        return [folder / name for name in in_order(file.name for file in files)]
    return files


class ImageArchive(ImageSet):
    """The array `arr_0`, uint8 [N, H, W, 3], of an `.npz` file; it is read a batch at a time."""

    def __init__(self, path: Path, crop_to: tuple[int, Crop] | None):
        self.path, self._crop_to = path, crop_to
        header = array_header(path, ARRAY)
        shape = header.shape
        if header.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or header.fortran_order:
            order = " in Fortran's order" if header.fortran_order else ""
            raise InputError(f"{ARRAY} in {path} is {header}{order}; images are uint8 [N, height, width, 3]")
        if shape[1] * shape[2] > MAX_PIXELS:
            raise InputError(f"{ARRAY} in {path} has images of {shape[2]}x{shape[1]} pixels; {MAX_PIXELS} can be read")
        self.count, self._shape = shape[0], shape[1:]
        self.size = (crop_to[0], crop_to[0]) if crop_to else (shape[2], shape[1])
        self.fingerprint = _digest(path, _crop_name(crop_to), _stamp(path))

    def read_ahead(self, batches: list[range]) -> Iterator[tuple[range, np.ndarray]]:
        bytes_of_image = int(np.prod(self._shape))
        with opened_array(self.path, ARRAY) as (stream, header):
            for batch in batches:
                stream.seek(header.offset + batch.start * bytes_of_image)
                data = stream.read(len(batch) * bytes_of_image)
                yield batch, self._cropped(np.frombuffer(data, np.uint8).reshape(len(batch), *self._shape))

    def _cropped(self, images: np.ndarray) -> np.ndarray:
        if self._crop_to is None:
            return images
        size, crop = self._crop_to
        return np.stack([crop(Image.fromarray(image), size) for image in images])


def _crop_name(crop_to: tuple[int, Crop] | None) -> str:
    return "" if crop_to is None else f"{crop_to[1].__name__} {crop_to[0]}"


def _stamp(path: Path, name: Path | None = None) -> str:
    status = path.stat()
    # The time of the last change of status cannot be set: copies that keep times are told apart.
    return f"{name or ''} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _digest(path: Path, *texts: str) -> str:
    digest = hashlib.sha256(os.fsencode(path.resolve()))
    for text in texts:
        digest.update(b"\0" + os.fsencode(text))
    return digest.hexdigest()
