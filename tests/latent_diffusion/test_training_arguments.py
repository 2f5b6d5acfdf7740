from pathlib import Path

import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.flags import EvaluationFlags
from latent_diffusion.training_arguments import SuiteArguments, SuiteTrainingArguments


def test_evaluation_needs_whole_weights(tmp_path):
    with pytest.raises(InputError, match="--eval_steps needs whole weights, which --sharding stage3 does not keep"):
        SuiteTrainingArguments(output_dir=str(tmp_path), do_train=True, eval_steps=5, sharding="stage3")


def test_the_evaluation_of_paddlenlp_is_refused_and_ours_is_named(tmp_path):
    with pytest.raises(InputError, match="--eval_steps with --eval_reference evaluates"):
        SuiteTrainingArguments(output_dir=str(tmp_path), do_train=True, do_eval=True)


def test_flags_of_both_classes_make_an_evaluation(tmp_path):
    found = SuiteArguments(eval_reference=str(tmp_path), eval_samples=9, eval_weights="w").evaluation(5)
    assert found == EvaluationFlags(5, 9, tmp_path, "inception", Path("w"))
    assert SuiteArguments().evaluation(None).steps is None
    with pytest.raises(InputError, match="belong together"):
        SuiteArguments().evaluation(5)
