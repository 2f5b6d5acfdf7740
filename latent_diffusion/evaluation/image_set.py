"""Images to be evaluated, by index: a folder of them, or the archive that `sample_ddp.py` and ADM's scripts write."""

import contextlib
import hashlib
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..errors import InputError
from ..extraction import ImageSource
from ..images import EXTENSIONS, Crop, images_below

ARCHIVE = ".npz"
ARRAY = "arr_0"


class ImageSet(ABC):
    """Images of one size.

    Attributes:
        path: where they are.
        count: how many there are.
        fingerprint: a short text that changes when they do.
        grouped: whether they lie in several folders, as one a class: neighbors in the order are alike.
    """

    path: Path
    count: int
    fingerprint: str
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
    if path.is_dir():
        return ImageFolder(path, crop_to, workers)
    if path.suffix == ARCHIVE and path.is_file():
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
        size, crop = crop_to or (0, self._uncropped)
        self.fingerprint = _digest(path, _crop_name(crop_to), *(_stamp(path / name, name) for name in names))
        self._source = ImageSource(path, names, size, crop, workers)
        self._size: tuple[int, int] | None = None

    def read_ahead(self, batches: list[range]) -> Iterator[tuple[range, np.ndarray]]:
        for batch, images, _ in self._source.read_ahead(batches):
            yield batch, images

    def _uncropped(self, image: Image.Image, _: int) -> np.ndarray:
        if self._size is None:
            with Image.open(self.path / self._source.names[0]) as first:
                self._size = first.size
        if image.size != self._size:
            (width, height), (first_width, first_height) = image.size, self._size
            raise ValueError(
                f"it has {width}x{height} pixels, the first one {first_width}x{first_height}; give --image-size"
            )
        return np.asarray(image)


def image_files(folder: Path) -> list[Path]:
    """The images below a folder: by number where all names are numbers, else by folder and name.

    Raises:
        InputError: there are none.
    """
    files = images_below(folder)
    if not files:
        raise InputError(f"the folder {folder} holds no images ({', '.join(EXTENSIONS)})")
    if all(file.stem.isdecimal() and file.parent == folder for file in files):
        return sorted(files, key=lambda file: (int(file.stem), file.name))
    return files


class ImageArchive(ImageSet):
    """The array `arr_0`, uint8 [N, H, W, 3], of an `.npz` file; it is read a batch at a time."""

    def __init__(self, path: Path, crop_to: tuple[int, Crop] | None):
        self.path, self._crop_to = path, crop_to
        with _opened_array(self.path) as stream:
            shape, dtype = _array_header(stream)
            self._offset = stream.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise InputError(f"{ARRAY} in {path} is {dtype} {list(shape)}; images are uint8 [N, height, width, 3]")
        self.count, self._shape = shape[0], shape[1:]
        self.fingerprint = _digest(path, _crop_name(crop_to), _stamp(path))

    def read_ahead(self, batches: list[range]) -> Iterator[tuple[range, np.ndarray]]:
        bytes_of_image = int(np.prod(self._shape))
        with _opened_array(self.path) as stream:
            for batch in batches:
                stream.seek(self._offset + batch.start * bytes_of_image)
                data = stream.read(len(batch) * bytes_of_image)
                if len(data) != len(batch) * bytes_of_image:
                    raise ValueError("it is cut off")
                yield batch, self._cropped(np.frombuffer(data, np.uint8).reshape(len(batch), *self._shape))

    def _cropped(self, images: np.ndarray) -> np.ndarray:
        if self._crop_to is None:
            return images
        size, crop = self._crop_to
        return np.stack([crop(Image.fromarray(image), size) for image in images])


@contextlib.contextmanager
def _opened_array(path: Path) -> Iterator[BinaryIO]:
    """The member of an archive that holds the images, from its first byte on."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{ARRAY}.npy") as stream:
            yield stream
    except InputError:
        raise
    except KeyError:
        raise InputError(f"{path} holds no array {ARRAY}, under which images are stored in an .npz file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"cannot read {ARRAY} of {path}: {' '.join(str(error).split())}") from None


def _array_header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the `.npy` array whose data follows in the stream."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the .npy format")
    shape, fortran_order, dtype = read(stream)
    if fortran_order:
        raise ValueError("its axes are in Fortran's order")
    return shape, dtype


def _crop_name(crop_to: tuple[int, Crop] | None) -> str:
    return "" if crop_to is None else f"{crop_to[1].__name__} {crop_to[0]}"


def _stamp(path: Path, name: Path | None = None) -> str:
    status = path.stat()
    return f"{name or ''} {status.st_size} {status.st_mtime_ns}"


def _digest(path: Path, *texts: str) -> str:
    digest = hashlib.sha256(str(path.absolute()).encode())
    for text in texts:
        digest.update(b"\0" + text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
