from pathlib import Path

import pytest

from latent_diffusion import checkpoint
from latent_diffusion.errors import InputError
from latent_diffusion.experiment import find_checkpoint, new_experiment


def complete(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    checkpoint.write_manifest(path, checkpoint.Progress(step, 8 * step, 0))
    return path


def test_experiments_are_numbered_on_from_the_highest(tmp_path):
    results = tmp_path / "results"
    assert new_experiment(results, "DiT-XL-2") == results / "000-DiT-XL-2"
    (results / "007-DiT-S-8").mkdir()
    (results / "notes").mkdir()
    assert new_experiment(results, "DiT-XL-2") == results / "008-DiT-XL-2"


def test_results_that_cannot_be_made_are_named(tmp_path):
    (tmp_path / "results").touch()
    with pytest.raises(InputError, match="cannot make an experiment folder in .*results"):
        new_experiment(tmp_path / "results", "DiT-XL-2")


def test_the_newest_experiment_of_the_model_with_a_checkpoint_is_resumed(tmp_path):
    expected = complete(tmp_path / "001-DiT-S-8", 20)
    complete(tmp_path / "001-DiT-S-8", 10)
    complete(tmp_path / "000-DiT-S-8", 90)
    complete(tmp_path / "002-DiT-B-8", 90)
    (tmp_path / "003-DiT-S-8").mkdir()
    assert find_checkpoint(tmp_path, "DiT-S-8", True) == expected


@pytest.mark.parametrize("results", ["", "nowhere"])
def test_nothing_to_resume_names_where_it_looked(tmp_path, results):
    with pytest.raises(InputError, match=rf"no experiment of DiT-S-8 with a checkpoint in .*{results}"):
        find_checkpoint(tmp_path / results, "DiT-S-8", True)


def test_a_checkpoint_or_an_experiment_can_be_named(tmp_path):
    complete(tmp_path / "any", 10)
    newest = complete(tmp_path / "any", 20)
    assert find_checkpoint(tmp_path, "x", tmp_path / "any/checkpoint-10") == tmp_path / "any/checkpoint-10"
    assert find_checkpoint(tmp_path, "x", tmp_path / "any") == newest
    with pytest.raises(InputError, match="--resume .*other is neither"):
        find_checkpoint(tmp_path, "x", tmp_path / "other")
