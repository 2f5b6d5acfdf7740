"""A few of the faults of a disk of which `python -m tests.faults disk` makes many."""

import random

import pytest

from . import disk, full_disk


@pytest.mark.parametrize(("name", "error"), [("trainer 1", "ENOSPC"), ("loop 1", "EIO"), ("loop 1", "EROFS")])
def test_a_save_that_fails_is_said_and_training_ends_the_same(server, kinds, quiet, tmp_path, name, error):
    disk.fail_once(server, kinds[name], quiet(name), tmp_path / "once", error, random.Random(0))
    disk.fail_for_a_while(server, kinds[name], quiet(name), tmp_path / "while", error)


@pytest.mark.parametrize(("name", "error"), [("trainer 1", "ESTALE"), ("loop 1", "EDQUOT"), ("loop 2", "ENOSPC")])
def test_a_last_save_that_fails_ends_the_run_in_one_sentence(server, kinds, quiet, tmp_path, name, error):
    disk.fail_at_last(server, kinds[name], quiet(name), tmp_path / "run", error)


@pytest.mark.parametrize("name", ["trainer 1", "loop 1"])
def test_a_limit_of_file_sizes_is_named(server, kinds, quiet, tmp_path, name):
    disk.limit_files(server, kinds[name], quiet(name), tmp_path / "run")


def test_a_full_disk_ends_a_command_in_one_sentence_but_no_training(server, kinds, tmp_path):
    if not full_disk.run_all(server, kinds, tmp_path / "full", ("packed extraction", "grid", "loop 1")):
        pytest.skip("no file systems can be made here")
