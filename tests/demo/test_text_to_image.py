import shlex

import numpy as np
import pytest

from demo.captions import TRAINING, Prompt, make_prompts
from demo.text_to_image import COMMANDS, share_above
from tests.cli.commands import REPOSITORY


def test_pairs_are_compared_digit_by_digit():
    prompts = [Prompt("", digit, trait) for digit in (0, 1) for trait in ("", "thin", "thick")]
    assert share_above(np.array([9, 1, 2, 9, 4, 3.0]), prompts, "thick", "thin") == pytest.approx(0.5)


def test_thick_prompts_are_paired_with_thin_ones_of_the_same_digit():
    prompts = make_prompts(TRAINING)
    inks = np.array([10 * prompt.digit + (prompt.trait == "thick") for prompt in prompts])
    assert share_above(inks, prompts, "thick", "thin") == 1


def test_logged_prompts_stay_whole_on_the_command_line():
    words = shlex.split(COMMANDS["train the U-ViT"])
    assert "the digit seven leaning left" in words
    assert (REPOSITORY / words[0]).is_file()
