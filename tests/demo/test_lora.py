import shlex

import numpy as np
import pytest

from demo.colors import COLORS, make_prompts, paint
from demo.lora import COMMANDS, measure, share_alike
from tests.cli.commands import REPOSITORY


class PerfectJudge:
    """Finds the digit in the first row of an image, which is that many times ten bright."""

    def read(self, images: np.ndarray) -> np.ndarray:
        return images[:, 0, 0, 0] // 10

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        return float((self.read(images) == labels).mean())


def draw(prompts, inks) -> np.ndarray:
    """Bright squares in these inks, with the digit where `PerfectJudge` finds it."""
    images = np.full((len(prompts), 8, 8, 3), 255, np.uint8)
    images = paint(images, np.array(inks), np.zeros((len(prompts), 3)))
    images[:, 0, 0] = np.array([10 * prompt.digit for prompt in prompts])[:, None]
    return images


def test_shares_are_of_what_was_asked_for():
    prompts = make_prompts()
    before = draw(prompts, [(255, 255, 255)] * len(prompts))
    after = draw(prompts, [COLORS[prompt.color] for prompt in prompts])
    assert measure(before, after, prompts, PerfectJudge()) == {
        "in_color_before": 0,
        "recognized_before": 1,
        "in_color": 1,
        "recognized": 1,
        "both_known": 1,
        "both_new": 1,
    }
    assert measure(after, before, prompts, PerfectJudge()) == {
        "in_color_before": 1,
        "recognized_before": 1,
        "in_color": 0,
        "recognized": 1,
        "both_known": 0,
        "both_new": 0,
    }


def test_what_was_not_in_training_is_told_apart():
    prompts = make_prompts()
    inks = [(255, 255, 255) if prompt.is_new else COLORS[prompt.color] for prompt in prompts]
    measured = measure(draw(prompts, inks), draw(prompts, inks), prompts, PerfectJudge())
    assert (measured["both_known"], measured["both_new"]) == (1, 0)
    assert measured["in_color"] == pytest.approx(0.75)


def test_rounding_is_no_difference():
    image = np.array([0, 255, 7, 7], np.uint8)
    assert share_alike(image, np.array([1, 254, 7, 7], np.uint8)) == 1
    assert share_alike(image, np.array([255, 0, 9, 7], np.uint8)) == 0.25


def test_prompts_stay_whole_on_the_command_line_and_commands_exist():
    lines = [shlex.split(line) for line in COMMANDS.values()]
    assert any("a red three" in words for words in lines)
    for words in lines:
        path = f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0]
        assert (REPOSITORY / path).is_file()
