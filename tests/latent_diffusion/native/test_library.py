import ctypes
import shutil
import subprocess
import sys

import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.native import library

HAS_COMPILER = shutil.which("cc") is not None


@pytest.fixture
def loaded_anew():
    """What is loaded after this depends on the test alone."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")
def test_the_kernels_build_and_load(tmp_path, monkeypatch, loaded_anew):
    monkeypatch.setattr(library, "FOLDER", tmp_path / "build")
    assert library.load() is None
    library.load.cache_clear()
    path = library.build()
    assert [path] == list((tmp_path / "build").iterdir())
    assert isinstance(library.load(), ctypes.CDLL) and library.load().threads() >= 1


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")
def test_a_source_that_does_not_compile_leaves_nothing(tmp_path, monkeypatch):
    source = tmp_path / "kernels.c"
    source.write_text("int broken(void) { return missing; }\n")
    monkeypatch.setattr(library, "SOURCE", source)
    monkeypatch.setattr(library, "FOLDER", tmp_path / "build")
    with pytest.raises(InputError, match="the kernels do not build: .*kernels.c"):
        library.build()
    assert not list((tmp_path / "build").iterdir())


def test_without_a_compiler_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="no C compiler .*apt-get install gcc"):
        library.build()


def test_the_command_goes_on_without_a_compiler(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "latent_diffusion.native"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("note: there is no C compiler") and not done.stderr


def test_a_library_that_does_not_load_is_as_if_it_were_not_there(tmp_path, monkeypatch, loaded_anew):
    damaged = tmp_path / "kernels.so"
    damaged.write_bytes(b"no library")
    monkeypatch.setattr(library, "path", lambda: damaged)
    assert library.load() is None and not library.has_bfloat16()
    assert library.state() == "no native kernels (python -m latent_diffusion.native builds them)"


@pytest.mark.parametrize("value", ["off", "OFF", "0", "false"])
def test_they_can_be_turned_off(monkeypatch, loaded_anew, value):
    monkeypatch.setenv("LATENT_DIFFUSION_KERNELS", value)
    assert library.load() is None and library.state() == "no native kernels"


def test_another_source_or_processor_is_another_library(monkeypatch):
    here = library.path()
    monkeypatch.setattr(library, "instruction_sets", lambda: ["sse2"])
    assert library.path() != here
    monkeypatch.undo()
    assert library.path() == here
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
    assert library.path() != here
