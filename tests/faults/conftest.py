"""What the tests of killed runs and of failing disks share."""

from pathlib import Path

import pytest

from . import shim
from .kills import Kind, Quiet, make_kinds, run_quietly
from .runs import Server


@pytest.fixture(scope="session")
def server() -> Server:
    """The process that runs are forked from, with the shim in it."""
    if not shim.is_available():
        pytest.skip("there is no C compiler")
    return Server()


@pytest.fixture(scope="session")
def fault_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def kinds(fault_folder) -> dict[str, Kind]:
    return make_kinds(fault_folder)


@pytest.fixture(scope="session")
def quiet(server, kinds, fault_folder):
    """`quiet("loop 1")`: the undisturbed run of a kind, made when it is first asked for."""
    made: dict[str, Quiet] = {}

    def get(name: str) -> Quiet:
        if name not in made:
            made[name] = run_quietly(server, kinds[name], fault_folder / "quiet" / name)
        return made[name]

    return get
