import json

import numpy as np
import pytest

from demo.captions import HELD_OUT, TRAINING, make_prompts
from demo.text_encoder import MAX_LENGTH, WIDTH, learn_merges, write_text_encoder
from demo.text_to_image import CONFIG
from latent_diffusion.text_encoder import TextEncoder
from tests.cli.commands import REPOSITORY
from uvit_ldm.configuration import UViTConfig

TEXTS = [prompt.text for prompt in make_prompts(TRAINING)]


def load(folder) -> TextEncoder:
    return TextEncoder.load(str(folder), str(folder), MAX_LENGTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "text_encoder"
    write_text_encoder(TEXTS, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder) -> TextEncoder:
    return load(folder)


def test_each_word_is_one_token(encoder):
    for prompt in make_prompts(HELD_OUT):
        tokens = encoder.tokenizer.tokenize(prompt.text)
        assert [token.removesuffix("</w>") for token in tokens] == prompt.text.split()
        assert len(tokens) + 2 <= MAX_LENGTH


def test_an_unknown_word_falls_into_known_parts(encoder):
    tokens = encoder.tokenizer.tokenize("threads")
    assert len(tokens) > 1 and "".join(tokens) == "threads</w>"
    assert encoder.tokenizer.unk_token not in tokens


def test_merges_make_words_whole_in_their_order():
    assert learn_merges(["aab ab", "3"]) == [("a", "b</w>"), ("a", "ab</w>")]


def test_texts_become_what_the_configuration_says(encoder):
    config = UViTConfig.from_json(str(REPOSITORY / CONFIG))
    assert encoder.encode(["the digit 3"])[0].shape == config.context_shape == (MAX_LENGTH, WIDTH)


def test_digits_differ_most_where_they_stand(encoder):
    three, seven = encoder.encode(["the digit three", "the digit seven"])
    difference = np.abs(three - seven).mean(axis=1)
    assert (difference[:3] == 0).all()
    assert difference[3] > 0.5 and difference[3] > 3 * difference[4:].max()


def test_the_same_encoder_is_made_again(folder, encoder, tmp_path):
    write_text_encoder(TEXTS, tmp_path / "again")
    np.testing.assert_array_equal(load(tmp_path / "again").encode(TEXTS[:3]), encoder.encode(TEXTS[:3]))
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    tokens = json.loads((folder / "vocab.json").read_text())
    assert sorted(tokens.values()) == list(range(len(tokens)))
