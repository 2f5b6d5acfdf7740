from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from demo.digits import load_folder, write_digit_folders
from demo.judge import Judge
from demo.merging import recognized
from demo.pipelines import BATCH_SIZE, DigitPipeline
from latent_diffusion.token_merging import MergesTokens


class Backbone(MergesTokens, paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.block = SimpleNamespace(merging=None)

    def _merging_blocks(self):
        return [self.block]


class Pipe:
    """Draws real digits, and with merged tokens nothing."""

    def __init__(self, images):
        self.images, self.backbone, self.calls = images, Backbone(), []
        self.components = {"unet": self.backbone}

    def set_progress_bar_config(self, **_kwargs):
        pass

    def remove_tome(self):
        self.backbone.remove_tome()

    def __call__(self, conditions, **kwargs):
        self.calls.append((len(conditions), kwargs))
        merging = self.backbone.block.merging
        scale = 0 if merging and merging.ratio else 1
        return SimpleNamespace(images=[scale * self.images[condition] for condition in conditions])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digit_folders(root)
    return load_folder(root / "val")


def test_the_recognized_share_is_of_samples_with_merged_tokens(digits):
    images, labels = digits
    judge, pipe = Judge().fit(images, labels), Pipe(images)
    drawn, conditions = DigitPipeline(pipe, guidance_scale=3.0), list(range(len(images)))
    whole, seconds = recognized(drawn, 0.0, conditions, labels, judge)
    merged, _ = recognized(drawn, 0.5, conditions, labels, judge)
    assert whole > 0.95 > 0.2 > merged
    assert seconds > 0
    assert pipe.backbone.block.merging is None


def test_conditions_are_drawn_in_order_by_batches(digits):
    images, _ = digits
    pipe = Pipe(images)
    drawn = DigitPipeline(pipe, guidance_scale=3.0).draw(range(BATCH_SIZE + 5))
    np.testing.assert_array_equal(drawn, images[: BATCH_SIZE + 5])
    assert [count for count, _ in pipe.calls] == [BATCH_SIZE, 5]
    assert pipe.calls[0][1]["guidance_scale"] == 3.0
