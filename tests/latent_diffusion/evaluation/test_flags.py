from pathlib import Path

import pytest

from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.flags import EvaluationFlags, add_evaluation_arguments, evaluation_flags


def parse(*arguments: object) -> EvaluationFlags:
    parser = ArgumentParser()
    add_evaluation_arguments(parser)
    return evaluation_flags(parser.parse_args([str(argument) for argument in arguments]))


def test_the_flags_are_read_in_either_spelling(tmp_path):
    assert parse() == EvaluationFlags(None, 5000, None, "inception", None)
    given = ("--eval_steps", 10, "--eval-samples", 2, "--eval_reference", tmp_path, "--eval-extractor", "dinov2")
    assert parse(*given, "--eval_weights", "w") == EvaluationFlags(10, 2, tmp_path, "dinov2", Path("w"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--eval_steps", 1), "--eval_steps and --eval_reference belong together"),
        (("--eval_reference", "."), "--eval_steps and --eval_reference belong together"),
        (("--eval_steps", 0, "--eval_reference", "."), "--eval_steps must be at least 1, not 0"),
        (("--eval_steps", 1, "--eval_reference", "nowhere"), "--eval_reference nowhere does not exist"),
        (("--eval_steps", 1, "--eval_reference", ".", "--eval_samples", 1), "--eval_samples must be at least 2, not 1"),
        (("--eval_extractor", "inceptoin"), "invalid choice"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(*arguments)
