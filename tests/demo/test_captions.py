import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from demo.captions import (
    HELD_OUT,
    TRAINING,
    WORDS,
    caption,
    ink,
    make_prompts,
    name_extremes,
    slant,
    write_captions,
)
from demo.digits import write_digit_folders
from latent_diffusion.errors import InputError
from uvit_ldm.captions import read_captions


def stroke(width: int = 4, lean: int = 0) -> np.ndarray:
    """A straight stroke from bottom to top, whose top is `lean` pixels farther to the right."""
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).line([(32, 60), (32 + lean, 4)], fill="white", width=width)
    return np.asarray(image)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digit_folders(root)
    return root / "train"


@pytest.fixture(scope="module")
def captions(digits, tmp_path_factory):
    file = tmp_path_factory.mktemp("captions") / "captions.json"
    write_captions(digits, file)
    return file


def test_a_thick_stroke_has_more_ink():
    thin, thick, white = ink(np.stack([stroke(2), stroke(8), np.full((64, 64, 3), 255, np.uint8)]))
    assert 0 < thin < thick < white == 1


def test_slant_is_the_shear_of_a_stroke():
    images = np.stack([stroke(lean=lean) for lean in (-21, 0, 21)])
    left, upright, right = slant(images)
    assert upright == pytest.approx(0, abs=0.01)
    assert right == pytest.approx(21 / 56, abs=0.02)
    assert left == pytest.approx(-21 / 56, abs=0.02)
    np.testing.assert_allclose(slant(np.roll(images, 3, axis=2)), [left, upright, right], atol=1e-6)


def test_an_image_without_ink_does_not_lean():
    assert slant(np.zeros((1, 64, 64, 3), np.uint8)) == [0]


def test_extremes_are_named_among_their_own_kind():
    values, labels = np.array([1, 2, 3, 4, 11, 12, 13, 14.0]), np.array([0] * 4 + [1] * 4)
    assert name_extremes(values, labels, "thin", "thick") == ["thin", "", "", "thick"] * 2


def test_an_image_is_described_in_several_wordings_and_by_its_traits():
    texts = caption(3, "thick", "", np.random.default_rng(0))
    assert len(set(texts)) == len(texts) == 6
    assert all(re.search(r"\b(three|3)\b", text) for text in texts)
    assert ["thick" in text for text in texts] == [False] * 4 + [True] * 2
    assert sum("leaning right" in text for text in caption(3, "", "right", np.random.default_rng(0))) == 2


def test_coco_reads_captions_that_name_the_digit_of_their_image(captions, digits):
    images = read_captions(captions)
    assert len(images) == 1437
    for image in images:
        word, numeral = WORDS[int(image.name.parent.name)], image.name.parent.name
        assert (digits / image.name).exists()
        assert len(image.captions) in (4, 6, 8)
        assert all(word in text.split() or numeral in text.split() for text in image.captions)


def test_captions_are_the_same_on_every_run(captions, digits, tmp_path):
    write_captions(digits, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == captions.read_bytes()


def test_thick_and_leaning_images_differ_from_thin_and_other_leaning_ones(captions, digits):
    of_word = {word: [] for word in ("thick", "thin", "left", "right")}
    for image in read_captions(captions):
        for word in set(" ".join(image.captions).split()) & of_word.keys():
            of_word[word].append(np.asarray(Image.open(digits / image.name)))
    measured = {word: np.stack(images) for word, images in of_word.items()}
    assert ink(measured["thick"]).mean() > 1.2 * ink(measured["thin"]).mean()
    assert slant(measured["right"]).mean() > slant(measured["left"]).mean() + 0.2
    assert all(len(images) / 1437 == pytest.approx(0.25, abs=0.01) for images in of_word.values())


def test_held_out_wordings_are_never_trained_on_but_all_of_their_words_are(captions):
    entries = json.loads(captions.read_text())["annotations"]
    trained = {entry["caption"] for entry in entries}
    prompts = make_prompts(HELD_OUT)
    assert not trained & {prompt.text for prompt in prompts}
    assert not set(TRAINING.all()) & set(HELD_OUT.all())
    assert {word for prompt in prompts for word in prompt.text.split()} <= set(" ".join(trained).split())
    assert len(TRAINING.plain) >= 8


@pytest.mark.parametrize("wordings", [TRAINING, HELD_OUT])
def test_prompts_are_balanced_and_use_every_wording(wordings):
    prompts = make_prompts(wordings)
    assert [prompt.digit for prompt in prompts] == [digit for digit in range(10) for _ in range(15)]
    for prompt in prompts:
        name = str(prompt.digit) if str(prompt.digit) in prompt.text else WORDS[prompt.digit]
        assert name in prompt.text.split() and prompt.trait in prompt.text
    patterns = [
        re.escape(wording).replace(r"\{digit\}", r"\w+").replace(r"\{trait\}", r"\w+") for wording in wordings.all()
    ]
    assert all(any(re.fullmatch(pattern, prompt.text) for prompt in prompts) for pattern in patterns)
    for trait in ("thick", "thin", "left", "right"):
        assert [prompt.digit for prompt in prompts if prompt.trait == trait] == [d for d in range(10) for _ in range(2)]


def test_a_folder_without_digits_is_named(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        write_captions(tmp_path, tmp_path / "captions.json")
    assert not list(tmp_path.iterdir())
