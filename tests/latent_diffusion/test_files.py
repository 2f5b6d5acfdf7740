import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from latent_diffusion import files
from latent_diffusion.errors import InputError
from latent_diffusion.files import locked_folder, new_folder, preparing_folder, publish_folder, replace_file
from latent_diffusion.weights import write_safetensors
from tests.cli.commands import REPOSITORY


def content(folder: Path) -> dict[str, str]:
    """All files below a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("old", "new"):
        replace_file(path, lambda temporary, text=text: temporary.write_text(text))
    assert content(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        raise failure

    with pytest.raises(type(failure)):
        replace_file(path, write)
    assert content(tmp_path) == {"a.txt": "old"}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_weights_can_be_read_by_whom_the_user_lets_read(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"a": np.zeros(1)})
        with new_folder(tmp_path / "pipeline", marker="unet") as folder:
            save_file({"a": np.zeros(1)}, folder / "unet")
    finally:
        os.umask(before)
    for file in ("a.safetensors", "pipeline/unet"):
        assert (tmp_path / file).stat().st_mode & 0o777 == mode


def test_a_failed_flush_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(descriptor):
        raise OSError(5, "input/output error")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="input/output"):
        replace_file(path, lambda temporary: temporary.write_text("new"))
    assert content(tmp_path) == {"a.txt": "old"}


def test_the_file_has_its_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"

    def write(temporary: Path) -> None:
        temporary.write_text("part")
        assert temporary.parent == tmp_path and not path.exists()
        temporary.write_text("all")

    replace_file(path, write)
    assert path.read_text() == "all"


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    target = tmp_path / "deep" / "folder"
    with new_folder(target, "kind.json") as folder:
        (folder / "stale.txt").write_text("old")
        (folder / "kind.json").touch()
    with new_folder(target, "kind.json") as folder:
        assert content(target) == {"stale.txt": "old", "kind.json": ""}
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("new")
    assert content(target) == {"sub/a.txt": "new"}
    assert names(tmp_path / "deep") == ["folder"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_folder_leaves_the_old_one(tmp_path, existing):
    target = tmp_path / "folder"
    if existing:
        target.mkdir()
        (target / "kind.json").write_text("old")

    with pytest.raises(ValueError, match="half way"), new_folder(target, "kind.json") as folder:
        (folder / "a.txt").write_text("new")
        raise ValueError("half way")
    assert content(tmp_path) == ({"folder/kind.json": "old"} if existing else {})
    assert names(tmp_path) == (["folder"] if existing else [])


def test_what_a_killed_run_left_is_removed(tmp_path):
    target = tmp_path / "folder"
    for path in (".folder.partial/half/a.txt", ".folder.old/a.txt", "folder/kind.json"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("old")
    with new_folder(target, "kind.json") as folder:
        assert folder == tmp_path / ".folder.partial" and not names(folder)
        (folder / "kind.json").write_text("new")
    assert names(tmp_path) == ["folder"] and content(target) == {"kind.json": "new"}


def test_a_folder_is_published_under_its_name(tmp_path):
    staging, target = tmp_path / ".staging", tmp_path / "folder"
    for text in ("old", "new"):
        staging.mkdir()
        (staging / "a.txt").write_text(text)
        publish_folder(staging, target)
        assert content(tmp_path) == {"folder/a.txt": text} and names(tmp_path) == ["folder"]


def test_a_folder_that_cannot_be_made_durable_is_not_published(tmp_path, monkeypatch):
    staging, target = tmp_path / ".staging", tmp_path / "folder"
    for folder, text in ((staging, "new"), (target, "old")):
        folder.mkdir()
        (folder / "a.txt").write_text(text)

    def fail(descriptor):
        raise OSError(5, "input/output error")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="input/output"):
        publish_folder(staging, target)
    assert content(target) == {"a.txt": "old"}


@pytest.fixture
def no_exchange(monkeypatch):
    """As on a network disk, which cannot let two folders change places."""
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)


def test_a_folder_is_replaced_where_two_cannot_change_places(tmp_path, no_exchange):
    test_a_folder_takes_the_place_of_the_old_one(tmp_path)


def test_a_folder_that_is_replaced_is_always_there(tmp_path, monkeypatch):
    """Its former and its new content change places in one step: no rename takes it away."""
    staging, target = tmp_path / ".staging", tmp_path / "folder"
    for folder, text in ((staging, "new"), (target, "old")):
        folder.mkdir()
        (folder / "a.txt").write_text(text)
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("a rename"))
    publish_folder(staging, target)
    assert content(tmp_path) == {"folder/a.txt": "new"}


def test_a_folder_that_a_killed_process_took_away_comes_back(tmp_path, no_exchange):
    target = tmp_path / "folder"
    former = tmp_path / ".folder.old"
    former.mkdir()
    (former / "kind.json").write_text("old")
    with pytest.raises(ValueError, match="half way"), new_folder(target, "kind.json"):
        assert content(target) == {"kind.json": "old"}
        raise ValueError("half way")
    assert content(tmp_path) == {"folder/kind.json": "old"}


def test_a_locked_folder_is_refused_to_others_and_free_afterwards(tmp_path):
    folder = tmp_path / "out"
    code = f"""
from pathlib import Path
from latent_diffusion.errors import InputError
from latent_diffusion.files import locked_folder
try:
    with locked_folder(Path({str(folder)!r}), patience=0.2):
        print("locked")
except InputError as error:
    print(error)
"""

    def other() -> str:
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with locked_folder(folder):
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        assert other() == f"{holder} is writing into {folder}; stop it, or choose another folder"
    assert other() == "locked"


def test_a_folder_made_for_its_lock_goes_with_it_if_nothing_came_of_it(tmp_path):
    for existing, left in ((tmp_path / "new", False), (tmp_path, True)):
        with pytest.raises(InputError, match="refused"), locked_folder(existing):
            raise InputError("refused")
        assert existing.exists() == left
    with pytest.raises(InputError, match="refused"), locked_folder(tmp_path / "used"):
        (tmp_path / "used/file").touch()
        raise InputError("refused")
    assert names(tmp_path / "used") == [".lock", "file"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch, no_exchange):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "kind.json").write_text("old")
    rename = Path.rename

    def fail_on_new(self, other):
        if self.suffix == ".partial":
            raise OSError(28, "disk full")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail_on_new)
    with pytest.raises(OSError, match="disk full"), new_folder(target, "kind.json") as folder:
        (folder / "a.txt").write_text("new")
    assert content(tmp_path) == {"folder/kind.json": "old"}


@pytest.mark.parametrize("target", ["folder", "file.txt", "."])
def test_what_is_no_older_folder_of_the_kind_is_never_replaced(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file.txt").write_text("a file")
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"holds no kind\.json"), new_folder(Path(target), "kind.json"):
        pytest.fail("the folder was opened")
    assert content(tmp_path) == before


@pytest.mark.parametrize(("target", "reason"), [("file.txt", "File exists"), ("file.txt/deep", "Not a directory")])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, target, reason):
    (tmp_path / "file.txt").touch()
    with (
        pytest.raises(InputError, match=rf"cannot make or write into the folder .*{target} \({reason}\); choose"),
        preparing_folder(tmp_path / target),
    ):
        (tmp_path / target).mkdir(parents=True, exist_ok=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)  # the tests may run as root
    with preparing_folder(tmp_path / "other"):
        pass
    with pytest.raises(InputError, match="the folder .* \\(Permission denied\\)"), preparing_folder(tmp_path):
        pass


@pytest.mark.parametrize("source", ["pipeline", "pipeline/unet", "link/unet", "elsewhere/../pipeline"])
def test_what_is_read_is_not_replaced(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline/unet").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("pipeline")
    with pytest.raises(InputError, match=f"pipeline would be replaced, and {source} is in it"):
        files.check_apart(Path("pipeline"), source)
    files.check_apart(Path("pipeline/new"), source, "owner/name")


def test_a_new_folder_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="cannot make or write into the folder .*out"),
        new_folder(tmp_path / "file/out", "x"),
    ):
        pass
