import errno
import os

import pytest
from visualdl import LogReader, LogWriter
from visualdl.io import bfile

from latent_diffusion import curves


@pytest.fixture
def outliving():
    """With the way of `curves` to write; VisualDL's own is back afterwards."""
    curves.outlive_failing_disk()
    yield
    bfile.default_file_factory.register_filesystem("", bfile.LocalFileSystem())


class FailingFile:
    """A file that takes half of what it is given, and then nothing."""

    def __init__(self, *words, **options):
        self._file, self._writes = open(*words, **options), 0  # noqa: PTH123, SIM115

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, content):
        self._writes += 1
        if self._writes > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(content[: len(content) // 2])


def test_what_a_full_disk_does_not_take_of_curves_is_lost_whole_and_said_once(outliving, tmp_path, monkeypatch, capsys):
    writer = LogWriter(str(tmp_path))
    writer.add_scalar("train/loss", 1.0, 1)
    writer._file_writer.flush()
    monkeypatch.setattr(curves, "open", lambda *words, **options: FailingFile(*words, **options), raising=False)
    for step in (2, 3):
        writer.add_scalar("train/loss", 1.0, step)
    writer._file_writer.flush()
    monkeypatch.undo()
    writer.add_scalar("train/loss", 1.0, 4)
    writer.close()
    (path,) = tmp_path.glob("vdlrecords*")
    assert [record.id for record in LogReader(file_path=str(path)).get_data("scalar", "train/loss")] == [1, 4]
    assert capsys.readouterr().err == f"warning: curves are being lost: No space left on device: {path}\n"


def test_curves_go_on_where_their_folder_was_removed(outliving, tmp_path):
    folder = tmp_path / "runs"
    writer = LogWriter(str(folder))
    writer._file_writer.flush()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    writer.add_scalar("train/loss", 1.0, 1)
    writer.close()
    (path,) = folder.glob("vdlrecords*")
    assert len(LogReader(file_path=str(path)).get_data("scalar", "train/loss")) == 1
