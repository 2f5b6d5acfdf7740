"""Folders of pretrained models: by path, or by name on the hub that ppdiffusers downloads from."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import reading
from .errors import InputError
from .runtime import import_paddlenlp

# repository/name, then folders in it; no part can be "." or "..".
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*){1,3}", re.ASCII)


def local_folder(name_or_path: str, files: Sequence[str | tuple[str, ...]], what: str) -> Path:
    """The folder `name_or_path`, or the one in the library's cache that then holds those `files` that the hub has.

    Nothing is loaded from the files. The hub is that of ppdiffusers, and so are the environment variables that choose
    it: `PPNLP_ENDPOINT`, `FROM_HF_HUB` with `HF_ENDPOINT`, `FROM_AISTUDIO`. Files in the cache are used without a hub.

    Args:
        name_or_path: an existing folder, or `repository/name` or `repository/name/folder` on the hub.
        files: names of files; of a tuple the first that exists is taken. The last entry is what the folder cannot do
            without.
        what: names the kind of model in errors, as in "VAE".

    Raises:
        InputError: it is no folder, and either no name on a hub or one whose last file cannot be had.
    """
    if (folder := Path(name_or_path)).is_dir():
        return folder
    name = name_or_path.rstrip("/")
    if not _HUB_NAME.fullmatch(name):
        raise InputError(f"the {what} folder {name_or_path} does not exist")
    failures: list[Exception] = []
    found = [_first_on_hub(name, (entry,) if isinstance(entry, str) else entry, failures) for entry in files]
    reason = type(failures[0]).__name__ if failures else "the hub has no such files"
    if found[-1] is None:
        raise InputError(
            f"the {what} {name_or_path!r} is neither a folder nor could it be downloaded ({reason}); "
            f"give the path of a downloaded {what} folder"
        ) from (failures[0] if failures else None)
    if failures:
        print(
            f"warning: the hub was not reached ({reason}); the {what} {name} is taken from the cache", file=sys.stderr
        )
    return found[-1].parent


def existing_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of `names` that is a file in a folder from `local_folder`.

    Raises:
        InputError: there is none.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"the {what} folder {folder} holds no {' or '.join(names)}")


def read_json(path: Path) -> dict:
    """The JSON object in a file of a pretrained model.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    try:
        content = reading.read_json(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content


def _first_on_hub(name: str, files: Sequence[str], failures: list[Exception]) -> Path | None:
    """The downloaded or cached file that comes first, or None; what kept a file from being had joins `failures`."""
    for file in files:
        try:
            if path := _download(name, file):
                return path
        except Exception as error:  # the hub's clients raise whatever their transport raises
            failures.append(error)
    return None


def _download(name: str, file: str) -> Path | None:
    """The file in the cache, downloaded if it was not there, or None where the hub does not have it."""
    # Downloading needs nothing of PaddleNLP; importing ppdiffusers does, and this way is faster.
    import_paddlenlp()
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    from ppdiffusers.utils.constants import FROM_AISTUDIO, FROM_HF_HUB
    from ppdiffusers.utils.download_utils import bos_aistudio_hf_download

    owner, repository, *folders = name.split("/")
    try:
        path = bos_aistudio_hf_download(
            f"{owner}/{repository}",
            file,
            subfolder="/".join(folders),
            from_hf_hub=FROM_HF_HUB,
            from_aistudio=FROM_AISTUDIO,
        )
    except Exception as error:
        # ppdiffusers hides what happened behind an error of its own. "Local" means that there was no connection.
        cause = error.__context__ or error
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return None
        raise cause from None
    return Path(path)
