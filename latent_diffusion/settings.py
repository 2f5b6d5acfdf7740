"""What a folder is a function of: a JSON file in it, so that no run continues what another one made."""

import os
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import preparing_folder, replace_file, write_json
from .reading import parse_json, read_bytes

SETTINGS = "settings.json"
_MAX_SETTINGS = 1 << 24


def claim_folder(folder: Path, settings: dict[str, Any], flag: str) -> None:
    """Makes a folder with its settings, or checks that it was made with the same; for one process of a run.

    Args:
        folder: to be made or continued.
        settings: plain values.
        flag: of the command line that names the folder.

    Raises:
        InputError: it was made with other settings, or holds something else, or cannot be written.
    """
    with preparing_folder(folder):
        _claim(folder, settings, flag)


def _claim(folder: Path, settings: dict[str, Any], flag: str) -> None:
    file = folder / SETTINGS
    if not os.path.lexists(file):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and has no {SETTINGS}: name or empty another folder for {flag}")
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda path: write_json(path, settings))
        return
    try:
        found = parse_json(read_bytes(file, _MAX_SETTINGS))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}, which says what is in the folder: {error}") from None
    for key in sorted(found.keys() | settings.keys()):
        if found.get(key) != settings.get(key):
            raise InputError(
                f"{folder} was made with {key} {found.get(key)!r}, not {settings.get(key)!r}; take another {flag} or "
                "remove the folder"
            )
