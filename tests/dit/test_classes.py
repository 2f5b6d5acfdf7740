import pytest

from dit.classes import WELL_KNOWN, default_labels, parse_labels, spread_classes
from dit.export import read_labels
from latent_diffusion.errors import InputError

NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "crane", 3: "golden retriever"}


@pytest.mark.parametrize(
    ("num_classes", "expected"), [(1000, WELL_KNOWN), (10, [0, 1, 2, 3, 5, 6, 7, 9]), (3, [0, 1, 2]), (1, [0])]
)
def test_default_labels_are_classes_of_the_model(num_classes, expected):
    assert default_labels(num_classes) == expected


def test_spread_classes_reach_from_the_first_to_the_last():
    assert spread_classes(100, 4) == [0, 33, 66, 99]


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["3", "0"], [3, 0]), (["Golden Retriever"], [3]), (["tinca tinca", "tench, Tinca tinca", "7"], [0, 0, 7])],
)
def test_numbers_and_names_mean_classes(words, expected):
    assert parse_labels(words, NAMES) == expected


def test_the_well_known_classes_have_their_imagenet_names():
    assert parse_labels(["golden retriever", "Arctic fox"], read_labels(None, 1000)) == [207, 279]


@pytest.mark.parametrize(
    ("word", "names", "message"),
    [
        ("goldn retriever", NAMES, "'goldn retriever' is unknown; similar ones are golden retriever"),
        ("zzzz", NAMES, "'zzzz' is unknown; give its number"),
        ("crane", NAMES, "'crane' means 1 and 2; give the number"),
        ("tench", None, "this model's classes have none; give --id2label FILE"),
    ],
)
def test_a_name_that_means_no_class_is_refused(word, names, message):
    with pytest.raises(InputError, match=message):
        parse_labels([word], names)
