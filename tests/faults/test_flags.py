"""A share of the combinations of flags.py, the same ones in every run."""

import dataclasses
import itertools
import random

import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.training_arguments import SuiteTrainingArguments

from . import flags
from .runs import Server

SEED = 0

# Of each command: flags alone, and three at a time.
ALONE, TOGETHER = 7, 4


@pytest.fixture(scope="module")
def server() -> Server:
    return Server()


@pytest.fixture(scope="module")
def files(tmp_path_factory, server):
    return flags.make_files(tmp_path_factory.mktemp("files"), server)


@pytest.mark.parametrize("name", flags.SURFACES)
def test_any_combination_of_flags_runs_or_is_refused_in_one_sentence(name, server, files, tmp_path):
    surface, rng = flags.SURFACES[name], random.Random(SEED)
    cases = rng.sample(flags.singles(surface), ALONE)
    cases += itertools.islice(flags.random_rows(surface, rng), TOGETHER)
    problems = [flags.check(case, server, tmp_path / str(number), files) for number, case in enumerate(cases)]
    assert not any(problems), "\n".join(filter(None, problems))


@pytest.mark.parametrize("name", flags.SURFACES)
def test_every_flag_has_values_that_are_tried(name):
    found = flags.surface_values(flags.SURFACES[name])
    assert set(found) == set(flags.SURFACES[name].actions())


def test_a_flag_without_values_is_found():
    surface = flags.SURFACES["convert back"]
    few = {flag: listed for flag, listed in surface.good.items() if flag != "use_ema"}
    with pytest.raises(AssertionError, match="no values of --use_ema"):
        flags.surface_values(dataclasses.replace(surface, good=few, bad={}))


@pytest.mark.parametrize("name", ["loop", "prompts"])
def test_the_values_of_any_two_flags_meet_in_a_row(name):
    surface = flags.SURFACES[name]
    rows = flags.covering(surface, random.Random(SEED))
    met = {frozenset(pair) for case in rows for pair in itertools.combinations(case.chosen, 2)}
    chosen = {flag: found["runs"] for flag, found in flags.surface_values(surface).items()}
    for (one, some), (other, others) in itertools.combinations(chosen.items(), 2):
        for value, beside in itertools.product(some, others):
            assert frozenset(((one, value), (other, beside))) in met


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor_parallel_degree": 2}, "--tensor_parallel_degree is not supported: a network is whole"),
        ({"dataloader_drop_last": True}, "--dataloader_drop_last has no effect on the endless stream"),
        ({"warmup_steps": 5}, "--warmup_steps has no effect with --lr_scheduler_type constant;"),
        ({"lr_scheduler_type": "linear", "lr_end": 1e-6}, "--lr_end has no effect with --lr_scheduler_type linear"),
        ({"report_to": "nonsense"}, "--report_to must be one of visualdl"),
        ({"run_name": "mine"}, "--run_name has no effect without --report_to wandb"),
        ({"device": "gpu:0"}, "--device gpu:0 is none that this Paddle can use"),
        ({"scale_loss": 2.0}, "--scale_loss has no effect without --fp16 or --bf16 on a GPU"),
        ({"max_steps": 0}, "--max_steps must be at least 1"),
        ({"adam_beta2": float("nan")}, "--adam_beta2 must be at least 0 and less than 1, not nan"),
    ],
)
def test_the_reason_is_said(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        SuiteTrainingArguments(output_dir=str(tmp_path), do_train=True, **given)


def test_degrees_of_one_process_are_none(tmp_path):
    SuiteTrainingArguments(output_dir=str(tmp_path), do_train=True, tensor_parallel_degree=1)
