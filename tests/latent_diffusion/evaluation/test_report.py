import json

import numpy as np
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation import report
from latent_diffusion.evaluation.metrics import (
    frechet_distance,
    inception_score,
    kernel_distances,
    manifold_scores,
    moments,
)
from latent_diffusion.evaluation.side import FeatureWork, Side, open_side, save_statistics

from .conftest import random_images, write_folder


@pytest.fixture
def work(tmp_path):
    return FeatureWork(tmp_path / "cache", batch_size=16)


@pytest.fixture
def sides(extractor):
    real, fake = extractor(random_images(60, size=16)), extractor(random_images(50, seed=1))
    return Side("real", real), Side("fake", fake)


def test_all_figures_are_those_of_the_metrics(sides, extractor):
    real, fake = (side.features for side in sides)
    found = report.compare(*sides).figures
    scores, kernel = (
        manifold_scores(real["features"], fake["features"]),
        kernel_distances(real["features"], fake["features"]),
    )
    assert found == {
        "fid": frechet_distance(moments(real["features"]), moments(fake["features"])),
        "sfid": frechet_distance(moments(real["spatial"]), moments(fake["spatial"])),
        "inception_score": inception_score(fake["logits"])[0],
        "inception_score_deviation": inception_score(fake["logits"])[1],
        "precision": scores.precision,
        "recall": scores.recall,
        "density": scores.density,
        "coverage": scores.coverage,
        "kid": kernel.mean,
        "kid_standard_error": kernel.standard_error,
        "kid_subset_size": 25,
    }


def test_only_what_is_wanted_is_computed(sides):
    every, found = report.compare(*sides), report.compare(*sides, ["inception_score", "recall"])
    left_out = {"sfid", "kid", "kid_standard_error", "kid_subset_size"}
    assert found.figures == {key: value for key, value in every.figures.items() if key not in left_out}
    assert found.missing == {}


def test_saved_statistics_stand_for_their_images(tmp_path, extractor, work):
    folder = write_folder(tmp_path / "real", random_images(30))
    reference = open_side(folder, extractor, work).extract()
    save_statistics(tmp_path / "real.npz", extractor, reference)
    saved, samples = open_side(tmp_path / "real.npz", extractor, work), Side("fake", extractor(random_images(30, 1)))
    by_images, by_statistics = (report.compare(side, samples) for side in (reference, saved))
    assert (saved.count, saved.moments_count) == (None, 30)
    assert saved.fingerprint != reference.fingerprint
    assert by_statistics.figures["fid"] == by_images.figures["fid"]
    assert by_statistics.figures["sfid"] == by_images.figures["sfid"]
    assert by_statistics.figures["inception_score"] == by_images.figures["inception_score"]
    assert by_statistics.missing.keys() == {"precision", "recall", "density", "coverage", "kid"}
    assert "there are no features of the images of" in by_statistics.missing["kid"]


def test_the_score_of_images_in_class_folders_does_not_depend_on_their_order(tmp_path, extractor, work):
    """Parts of consecutive images would show a class each."""
    for label in range(4):
        images = np.full((20, 8, 8, 3), 60 * label, np.uint8) + random_images(20, label) // 16
        write_folder(tmp_path / "images" / str(label), images)
    side = open_side(tmp_path / "images", extractor, work).extract()
    found = report.compare(side, side).figures["inception_score"]
    consecutive, whole = (inception_score(side.features["logits"], splits)[0] for splits in (10, 1))
    assert abs(found - whole) < 0.3 * abs(consecutive - whole)


def test_a_file_of_images_and_statistics_gives_each_figure_what_it_needs(tmp_path, extractor, work):
    """As ADM's reference files: moments of all of ImageNet, and ten thousand images."""
    pixels = random_images(20)
    np.savez(
        tmp_path / "adm.npz", arr_0=pixels, mu=np.full(4, 9.0), sigma=np.eye(4), mu_s=np.zeros(3), sigma_s=np.eye(3)
    )
    side = open_side(tmp_path / "adm.npz", extractor, work)
    assert np.array_equal(side.moments("features").mean, np.full(4, 9.0))
    assert extractor.images == 0
    assert (side.extract().count, side.moments_count) == (20, None)
    assert np.allclose(side.features["features"], extractor(pixels)["features"], atol=1e-6)


def test_few_images_leave_out_what_needs_more(extractor):
    few = Side("few", extractor(random_images(3)))
    found = report.compare(few, Side("many", extractor(random_images(30, 1))))
    assert found.figures.keys() == {"fid", "sfid", "inception_score", "inception_score_deviation"}
    assert "at least 6 are needed" in found.missing["coverage"]


def test_one_image_is_an_error(extractor):
    one = Side("one", extractor(random_images(1)))
    with pytest.raises(InputError, match="at least 2 are needed"):
        report.compare(one, Side("many", extractor(random_images(30, 1))))


def test_equal_sets_are_at_no_distance(extractor):
    side = Side("a", extractor(random_images(40)))
    figures = report.compare(side, side).figures
    assert figures["fid"] == pytest.approx(0, abs=1e-10)
    assert (figures["precision"], figures["recall"], figures["coverage"]) == (1, 1, 1)


def test_an_extractor_without_an_output_leaves_its_figures_out(extractor):
    features = {"features": extractor(random_images(30))["features"]}
    found = report.compare(Side("a", features), Side("b", features))
    assert found.missing.keys() == {"sfid", "inception_score"}


def test_the_table_shows_figures_spreads_reasons_and_numbers(extractor):
    found = report.Report(
        {"fid": 2.27, "kid": 0.0012, "kid_standard_error": 0.0003, "kid_subset_size": 20}, {"sfid": "there is none"}
    )
    sides = Side("a", saved={"features": None}), Side("b", {"features": np.zeros((40, 4))})
    assert report.table(found, *sides, extractor).splitlines() == [
        "Frechet distance (averages)      2.2700",
        "sFID                                  -  there is none",
        "KID                            0.001200 ± 0.000300 (subsets of 20)",
        "images                       a saved statistics of an unknown number, b 40",
    ]


def test_too_few_images_for_the_distance_are_noted(extractor):
    few, enough = (Side("few", {"features": np.zeros((count, 4))}) for count in (4, 5))
    (note,) = report.notes(few, enough, extractor)
    assert note.startswith("few has 4 images, not more than its features have dimensions (4)")
    assert report.notes(Side("unknown", saved={"features": None}), enough, extractor) == []


def test_images_of_other_sizes_are_noted(tmp_path, extractor, work):
    sides = [
        open_side(write_folder(tmp_path / str(size), random_images(9, size=size)), extractor, work) for size in (8, 16)
    ]
    (note,) = report.notes(*sides, extractor)
    assert "have 8x8 and 16x16 pixels; --image-size" in note
    assert report.notes(sides[0], sides[0], extractor) == []


def test_the_file_says_what_was_compared(tmp_path, sides, extractor):
    found = report.compare(*sides)
    report.write(tmp_path / "new" / "a.json", found, *sides, extractor)
    content = json.loads((tmp_path / "new" / "a.json").read_text())
    assert content["fid"] == found.figures["fid"]
    assert content["images"] == {"reference": 60, "samples": 50}
    assert content["extractor"] == "averages-1"
    assert content["not_computed"] == {}
