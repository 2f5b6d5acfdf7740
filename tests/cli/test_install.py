"""What scripts/install.sh says when it cannot go on; nothing is installed here."""

import os
import subprocess
import sys
from pathlib import Path

from .commands import REPOSITORY

INSTALL = REPOSITORY / "scripts" / "install.sh"


def install(folder: Path, python: object, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess:
    requirements = folder / "requirements.txt"
    requirements.write_text("no-such-package-of-this-name==0.0.0\n")
    return subprocess.run(
        ["/bin/sh", str(INSTALL), str(python), "venv", str(requirements)],
        cwd=folder,
        env=os.environ | {"PATH": path, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
        capture_output=True,
        text=True,
    )


def stand_in(folder: Path, body: str) -> Path:
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    return python


def test_an_interpreter_that_is_missing_is_named(tmp_path):
    result = install(tmp_path, "python3.99")
    assert result.returncode == 1
    assert "there is no python3.99" in result.stderr and "make PYTHON=python3.11" in result.stderr


def test_a_version_without_a_lock_is_named(tmp_path):
    python = stand_in(tmp_path, '[ "$1" = -V ] && echo Python 3.13.0; exit 1')
    result = install(tmp_path, python)
    assert result.returncode == 1 and "is Python 3.13.0; the lock is for Python 3.10 to 3.12" in result.stderr


def test_a_missing_venv_module_is_named_each_time(tmp_path):
    """A failed try leaves the folder's interpreter behind, without pip: the next must not take it for complete."""
    body = '[ "$2" = venv ] && mkdir -p venv/bin && printf "#!/bin/sh\\nexit 1\\n" > venv/bin/python && exit 1; exit 0'
    python = stand_in(tmp_path, body)
    for _ in range(2):
        result = install(tmp_path, python)
        assert result.returncode == 1 and "apt-get install python3-venv" in result.stderr


def test_a_failed_package_is_named(tmp_path):
    result = install(tmp_path, sys.executable)
    assert result.returncode == 1
    assert "no-such-package-of-this-name" in result.stderr
    assert "install failed: pip could not install" in result.stderr and "venv/install.log" in result.stderr
