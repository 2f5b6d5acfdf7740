"""A bounded form of `data` and `folder`, and checks that they would notice what they look for."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from latent_diffusion.errors import InputError

from . import data, data_layouts, folder
from .data_layouts import Layout, checksum

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")


def test_every_mutation_of_every_layout_is_harmless_or_named(tmp_path):
    figures = data.run(tmp_path, scale=0)
    assert figures["layouts"] == len(data_layouts.LAYOUTS)
    assert figures["cases"] == figures["same"] + figures["values"] + figures["refused"] >= 1000


def test_a_folder_of_many_images_is_opened_quickly_in_little_memory(tmp_path):
    assert folder.run(tmp_path, scale=0.02)["images"] == 20_000


def test_a_folder_that_takes_too_much_memory_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "FIXED_MB", -100)
    with pytest.raises(AssertionError, match="MiB, DiT files"):
        folder.run(tmp_path, scale=0.0001)


def unchecked(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=True)


def hang(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), np.uint8)


def die(path: Path) -> np.ndarray:
    os._exit(7)


def refuse_in_two_lines(path: Path) -> np.ndarray:
    error = InputError("")
    error.args = (f"cannot read {path}:\nno idea",)
    raise error


@pytest.mark.parametrize(
    ("read", "change", "message"),
    [
        (unchecked, "objects", "a payload was executed"),
        (unchecked, "deleted", "Traceback"),
        (unchecked, "Fortran's order", None),
        (unchecked, "not a number", "values that are not finite were let in"),
        (hang, "a pipe in its place", "the process ended or hung"),
        (die, "one byte more", "the process ended or hung"),
        (refuse_in_two_lines, "one byte more", "not one line"),
        (lambda path: warnings.warn("spam", stacklevel=1) or unchecked(path), "one byte more", "UserWarning: spam"),
        (lambda path: unchecked(path.with_name("a.npy")), "one byte more", "other values"),
    ],
)
def test_a_careless_reader_is_found_out(tmp_path, monkeypatch, read, change, message):
    """Each is right about the intact folder."""

    def build(path: Path) -> None:
        for name in "ab":
            np.save(path / f"{name}.npy", np.arange(6.0).reshape(2, 3) + (name == "b"))

    def values(path: Path) -> data_layouts.Values:
        if path.name == "intact":
            return {(f"{name}.npy", ""): checksum(unchecked(path / f"{name}.npy")) for name in "ab"}
        return {(f"{name}.npy", ""): checksum(read(path / f"{name}.npy")) for name in "ab"}

    monkeypatch.setattr(data, "LAYOUTS", [Layout("careless", build, lambda path: path, values)])
    monkeypatch.setattr(data, "TIMEOUT", 1.0)
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    intact = data.make_templates()
    case = data.Case(0, 0, ((change, "a.npy"),), late=False)
    ((_, end, found),) = data.read_cases([case], intact, seed=0)
    if message is None:
        assert end == "same"
    else:
        assert end == "failed" and message in found
