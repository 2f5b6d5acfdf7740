import tracemalloc
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.evaluation import metrics
from latent_diffusion.evaluation.metrics import (
    Moments,
    count_blocks,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distances,
    manifold_scores,
    moments,
)

WIDTH = 8


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """Features of two sets, logits, and the values that independent programs compute of them."""
    with np.load(Path(__file__).parents[2] / "data" / "metrics" / "metrics.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(params=[None, 170])
def blocks(request, monkeypatch):
    """Sets as one block, and as several with a smaller one at the end."""
    if request.param:
        monkeypatch.setattr(metrics, "BLOCK", request.param)


def features(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def images_like(mean: float, count: int = 12) -> np.ndarray:
    """Features of images that are all the same."""
    return np.full((count, WIDTH), mean, np.float32)


def spoiled(value: float) -> np.ndarray:
    array = features(12)
    array[7, 3] = value
    return array


@pytest.mark.parametrize("side", ["real", "fake"])
def test_moments(blocks, reference, side):
    actual = moments(reference[side])
    assert actual.mean.dtype == actual.covariance.dtype == np.float64
    np.testing.assert_allclose(actual.mean, reference[f"mu_{side}"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(actual.covariance, reference[f"sigma_{side}"], rtol=0, atol=1e-12)


def test_moments_of_a_memory_map(tmp_path, reference):
    np.save(tmp_path / "real.npy", reference["real"])
    actual = moments(np.load(tmp_path / "real.npy", mmap_mode="r"))
    np.testing.assert_allclose(actual.covariance, reference["sigma_real"], rtol=0, atol=1e-12)


def test_moments_keep_small_variances_beside_a_large_mean():
    small = features(500) * 1e-3
    np.testing.assert_allclose(
        moments(small.astype(np.float64) + 1e6).covariance, moments(small).covariance, rtol=0, atol=1e-12
    )


def test_frechet_distance(reference):
    real, fake = moments(reference["real"]), moments(reference["fake"])
    assert frechet_distance(real, fake) == pytest.approx(float(reference["fid"]), abs=1e-8)
    assert frechet_distance(fake, real) == pytest.approx(float(reference["fid"]), abs=1e-8)
    moved = Moments(real.mean, fake.covariance)
    assert frechet_distance(real, moved) == pytest.approx(float(reference["fid_cov_term"]), abs=1e-8)


def test_frechet_distance_of_fewer_images_than_dimensions(reference):
    real, fake = moments(reference["real"][:40]), moments(reference["fake"][:40])
    assert frechet_distance(real, fake) == pytest.approx(float(reference["fid_few"]), abs=1e-5)


@pytest.mark.parametrize("count", [2, 40, 1000])
def test_frechet_distance_of_identical_sets_is_zero(reference, count):
    side = moments(reference["real"][:count])
    assert 0 <= frechet_distance(side, side) < 1e-10


def test_frechet_distance_of_sets_that_vary_in_different_directions_only():
    """The root's trace is 0; the root of a rounding error would be far larger than the error."""
    directions = np.linalg.qr(features(64, width=64).astype(np.float64))[0]
    real, fake = (
        moments(features(40, seed, width=20) @ directions[part]) for seed, part in ((1, slice(20)), (2, slice(40, 60)))
    )
    difference = real.mean - fake.mean
    expected = difference @ difference + np.trace(real.covariance) + np.trace(fake.covariance)
    assert frechet_distance(real, fake) == pytest.approx(expected, abs=1e-11)


def test_frechet_distance_of_constant_images():
    constant, other = moments(images_like(1)), moments(features(100))
    assert frechet_distance(constant, moments(images_like(3))) == pytest.approx(4 * WIDTH, abs=1e-12)
    spread = ((1 - other.mean) ** 2).sum() + np.trace(other.covariance)
    assert frechet_distance(constant, other) == pytest.approx(spread, abs=1e-12)
    assert frechet_distance(other, constant) == pytest.approx(spread, abs=1e-12)


def test_frechet_distance_takes_moments_that_were_rounded_to_float32(reference):
    real, fake = (
        Moments(*(array.astype(np.float32).astype(np.float64) for array in astuple(moments(reference[side][:40]))))
        for side in ("real", "fake")
    )
    assert frechet_distance(real, fake) == pytest.approx(float(reference["fid_few"]), abs=1e-3)


def damaged(how: str) -> Moments:
    mean, covariance = np.zeros(WIDTH), np.eye(WIDTH)
    if how == "negative":
        covariance[2, 2] = -0.1
    elif how == "skewed":
        covariance[2, 3] = 0.1
    elif how == "infinite":
        covariance[2, 2] = np.inf
    else:
        mean[2] = np.nan
    return Moments(mean, covariance)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("negative", "the covariance of {} has negative eigenvalues"),
        ("skewed", "the covariance of {} is not symmetric"),
        ("infinite", "the statistics of {} hold NaN or infinite values"),
        ("nan", "the statistics of {} hold NaN or infinite values"),
    ],
)
def test_damaged_moments_are_refused(how, message):
    for sound in (Moments(np.zeros(WIDTH), np.eye(WIDTH)), Moments(np.zeros(WIDTH), np.zeros((WIDTH, WIDTH)))):
        with pytest.raises(InputError, match=message.format("the reference images")):
            frechet_distance(damaged(how), sound)
        with pytest.raises(InputError, match=message.format("the generated images")):
            frechet_distance(sound, damaged(how))


def test_kernel_distance(blocks, reference):
    expected = float(reference["kid_unbiased"])
    assert kernel_distance(reference["real"], reference["fake"]) == pytest.approx(expected, abs=1e-12)


def test_kernel_distance_of_sets_of_different_sizes(blocks, reference):
    real, fake = (reference[side][:count].astype(np.float64) for side, count in (("real", 300), ("fake", 500)))

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = [kernel(x, x)[~np.eye(len(x), dtype=bool)].mean() for x in (real, fake)]
    expected = sum(within) - 2 * kernel(real, fake).mean()
    assert kernel_distance(real, fake) == pytest.approx(expected, abs=1e-12)


def test_kernel_distances_of_subsets(reference):
    actual = kernel_distances(reference["real"], reference["fake"], subsets=10, size=100)
    assert actual.mean == pytest.approx(float(reference["kid_subset_mean"]), abs=1e-12)
    assert actual.deviation == pytest.approx(float(reference["kid_subset_std"]), abs=1e-12)
    unbiased = reference["kid_subset_values"].std(ddof=1) / 10**0.5
    assert actual.standard_error == pytest.approx(unbiased, abs=1e-12)
    assert actual.subset_size == 100


def test_subsets_have_half_of_the_smaller_side_at_most(reference):
    actual = kernel_distances(reference["real"][:61], reference["fake"], subsets=5)
    assert actual.subset_size == 30 and actual.deviation > 0


def test_inception_score(reference):
    mean, deviation = inception_score(reference["logits"])
    assert mean == pytest.approx(float(reference["is_mean"]), abs=1e-10)
    assert deviation == pytest.approx(float(reference["is_std"]), abs=1e-10)
    assert inception_score(reference["logits"], splits=1) == pytest.approx(
        (float(reference["is_one_split"]), 0), abs=1e-10
    )


def test_parts_of_the_inception_score_are_consecutive_and_hold_all_images(reference):
    logits = reference["logits"][:7]
    parts = [inception_score(part, splits=1)[0] for part in (logits[:3], logits[3:5], logits[5:])]
    assert inception_score(logits, splits=3) == pytest.approx((np.mean(parts), np.std(parts)), abs=1e-12)


def test_inception_score_of_certain_and_of_constant_logits():
    assert inception_score(np.tile(np.eye(10, 20, dtype=np.float32) * 1e4, (20, 1))) == pytest.approx((10, 0))
    assert inception_score(images_like(5)) == pytest.approx((1, 0))


@pytest.mark.parametrize("k", [3, 5])
def test_manifold_scores(blocks, reference, k):
    expected = [float(reference[f"{name}_k{k}"]) for name in ("precision", "recall", "density", "coverage")]
    assert astuple(manifold_scores(reference["real"], reference["fake"], k, k)) == pytest.approx(expected, abs=1e-15)


def test_manifold_scores_with_two_numbers_of_neighbors(reference):
    actual = manifold_scores(reference["real"], reference["fake"])
    assert (actual.precision, actual.recall) == (reference["precision_k3"], reference["recall_k3"])
    assert (actual.density, actual.coverage) == (reference["density_k5"], reference["coverage_k5"])


def test_swapped_sets_have_precision_and_recall_swapped(reference):
    swapped = manifold_scores(reference["fake"], reference["real"])
    assert (swapped.precision, swapped.recall) == (reference["recall_k3"], reference["precision_k3"])


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("side", ["real", "fake"])
def test_radii(blocks, reference, side, k):
    squared = metrics._squared_radii(reference[side], reference["mu_real"], k, lambda: None)
    np.testing.assert_allclose(np.sqrt(squared[:, -1]), reference[f"radii_{side}_k{k}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("repeats", [1, 3, 7])
def test_identical_sets_have_all_images_in_balls(blocks, offset, repeats):
    """With 3 repeats the nearest neighbors are duplicates and others; with 7, all radii are 0."""
    images = np.tile(features(100, width=37) + np.float32(offset), (repeats, 1))
    shuffled = np.random.default_rng(1).permutation(images)
    scores = manifold_scores(images, shuffled)
    assert (scores.precision, scores.recall, scores.coverage) == (1, 1, 1)
    # A ball holds the image with its duplicates, and of its neighbors as many as reach 5 with theirs.
    assert scores.density == {1: 6, 3: 6, 7: 7}[repeats] / 5


def test_a_large_mean_does_not_change_manifold_scores():
    real, fake = features(300).astype(np.float64), features(200, seed=1).astype(np.float64)
    assert manifold_scores(real + 1e6, fake + 1e6) == manifold_scores(real, fake)


def test_sets_apart_have_no_image_in_balls():
    assert astuple(manifold_scores(features(50), features(50, seed=1) + 100)) == (0, 0, 0, 0)


def test_manifold_scores_of_constant_images():
    equal = manifold_scores(images_like(0.3), images_like(0.3))
    assert (equal.precision, equal.recall, equal.coverage) == (1, 1, 1)
    assert astuple(manifold_scores(images_like(0.3), images_like(0.3001))) == (0, 0, 0, 0)


@pytest.mark.parametrize(("real", "fake"), [(1, 1), (10, 10), (25, 41)])
def test_every_block_is_announced(monkeypatch, real, fake):
    monkeypatch.setattr(metrics, "BLOCK", 10)
    calls = []
    manifold_scores(features(real + 9), features(fake + 9), on_block=lambda: calls.append(None))
    assert len(calls) == count_blocks(real + 9, fake + 9)


def test_memory_does_not_grow_with_pairs(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 128)
    count = 2000
    real, fake = features(count), features(count, seed=1)
    tracemalloc.start()
    try:
        manifold_scores(real, fake)
        kernel_distance(real, fake)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < count * count  # not a byte a pair


COMPARISONS = [kernel_distance, kernel_distances, manifold_scores]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("compare", COMPARISONS)
def test_features_that_are_not_finite_are_refused(compare, value):
    message = "the features of the {} images hold NaN or infinite values"
    with pytest.raises(InputError, match=message.format("reference")):
        compare(spoiled(value), features(12))
    with pytest.raises(InputError, match=message.format("generated")):
        compare(features(12), spoiled(value))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("score", [moments, inception_score])
def test_values_of_one_set_that_are_not_finite_are_refused(blocks, score, value):
    with pytest.raises(InputError, match="hold NaN or infinite values"):
        score(np.concatenate([features(200), spoiled(value)]))


@pytest.mark.parametrize(
    ("compare", "least"),
    [
        (kernel_distance, 2),
        (kernel_distances, 4),
        (manifold_scores, 6),
        (lambda real, fake: manifold_scores(real, fake, precision_k=6, density_k=2), 7),
    ],
)
def test_too_few_images_are_refused(compare, least):
    compare(features(least), features(least, seed=1))
    message = f"there are {least - 1} of the {{}} images and at least {least} are needed"
    with pytest.raises(InputError, match=message.format("reference")):
        compare(features(least - 1), features(12))
    with pytest.raises(InputError, match=message.format("generated")):
        compare(features(12), features(least - 1))


def test_one_image_has_no_covariance():
    with pytest.raises(InputError, match="there are 1 of the images and at least 2 are needed"):
        moments(features(1))


def test_an_inception_score_needs_an_image_for_each_part():
    assert inception_score(features(10))[0] == pytest.approx(1)
    with pytest.raises(InputError, match="there are 9 of the generated images and at least 10 are needed"):
        inception_score(features(9))


@pytest.mark.parametrize("compare", [*COMPARISONS, lambda real, fake: frechet_distance(moments(real), moments(fake))])
def test_sets_of_different_extractors_are_refused(compare):
    with pytest.raises(InputError, match=f"have {WIDTH} dimensions and those of the generated images 5"):
        compare(features(12), features(12, width=5))
