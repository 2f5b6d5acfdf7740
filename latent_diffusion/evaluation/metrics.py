"""Distances between two sets of features and scores of one: NumPy alone, in float64.

Features are [N, D], one row an image, usually float32 and possibly a memory map; they are widened block by block.
"Real" is the reference set, "fake" the generated one. Pairs of images are compared block by block, so that memory
does not grow with their number.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

# Images of each set that are compared at a time: 32 MiB of distances.
BLOCK = 2048

# What the sum of the negative eigenvalues of a covariance may be of that of all, in size; one that was saved in
# float32 has 1e-6.
NEGATIVE_SHARE = 1e-4

REAL, FAKE = "the reference images", "the generated images"


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] (divisor N - 1) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True)
class KernelDistance:
    """Kernel distances of subsets (KID).

    Attributes:
        mean: over the subsets, not multiplied by 1000.
        deviation: between the subsets, divisor n, as torch-fidelity has it.
        standard_error: of the mean. It takes subsets as independent: they are less so the more of an image set they
            draw together.
        subset_size: images a side of each subset.
    """

    mean: float
    deviation: float
    standard_error: float
    subset_size: int


@dataclass(frozen=True)
class ManifoldScores:
    """Precision, recall and coverage are shares of images; density is 1 on average where the sets are alike."""

    precision: float
    recall: float
    density: float
    coverage: float


def moments(features: np.ndarray, whose: str = "the images") -> Moments:
    """Mean and covariance of features [N, D]; `whose` names the images in errors.

    Raises:
        InputError: there are fewer than 2 images, or a feature is not finite.
    """
    _check_features(features, whose, least=2)
    count, width = features.shape
    mean = sum(block.sum(axis=0) for _, block in _blocks(features)) / count
    covariance = np.zeros((width, width))
    for _, centered in _blocks(features, mean):
        covariance += centered.T @ centered
    return Moments(mean, covariance / (count - 1))


def frechet_distance(real: Moments, fake: Moments) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (FID; Heusel et al., arXiv 1706.08500).

    With S1 = A A^T and S2 = B B^T, the trace of the root is the sum of the singular values of A^T B: their squares are
    the eigenvalues of S1^(1/2) S2 S1^(1/2). So the result is stable where covariances are singular, as those of fewer
    images than dimensions. The root is real if no covariance has negative eigenvalues, which is checked.

    Returns:
        At least 0, the least possible value; rounding can bring the sum below it.

    Raises:
        InputError: the sides have different dimensions, or the moments of one cannot be those of any images.
    """
    _check_widths(real.mean.size, fake.mean.size)
    root_trace = np.linalg.svd(_factor(real, REAL).T @ _factor(fake, FAKE), compute_uv=False).sum()
    difference = real.mean - fake.mean
    distance = difference @ difference + np.trace(real.covariance) + np.trace(fake.covariance) - 2 * root_trace
    return max(float(distance), 0.0)


def _factor(side: Moments, whose: str) -> np.ndarray:
    """A [D, rank] with covariance = A A^T. Eigenvalues that are only rounding are left out."""
    covariance = side.covariance
    if not (np.isfinite(side.mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"the statistics of {whose} hold NaN or infinite values; make them again")
    if np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
        raise InputError(f"the covariance of {whose} is not symmetric: the statistics are damaged, make them again")
    values, vectors = np.linalg.eigh(covariance)
    if -values[values < 0].sum() > NEGATIVE_SHARE * np.abs(values).sum():
        raise InputError(
            f"the covariance of {whose} has negative eigenvalues: the statistics are damaged, make them again"
        )
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def kernel_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3 (KID; Binkowski et al., arXiv 1801.01401).

    Args:
        real: [N, D].
        fake: [M, D].

    Raises:
        InputError: a side has fewer than 2 images or features that are not finite, or their dimensions differ.
    """
    _check_sides(real, fake, least=2)
    return _kernel_distance(real, fake)


def kernel_distances(
    real: np.ndarray, fake: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """`kernel_distance` of random subsets, drawn as torch-fidelity draws them.

    Args:
        real: [N, D].
        fake: [M, D].
        subsets: at least 2.
        size: images a side of a subset. It is cut to half of the smaller side, so that subsets differ.
        seed: of `numpy.random.RandomState`.

    Raises:
        InputError: a side has fewer than 4 images or features that are not finite, or their dimensions differ.
    """
    _check_sides(real, fake, least=4)
    size = min(size, len(real) // 2, len(fake) // 2)
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        chosen_real = random.choice(len(real), size, replace=False)
        chosen_fake = random.choice(len(fake), size, replace=False)
        values.append(_kernel_distance(real[chosen_real], fake[chosen_fake]))
    deviation = float(np.std(values))
    return KernelDistance(float(np.mean(values)), deviation, deviation / (subsets - 1) ** 0.5, size)


def _kernel_distance(real: np.ndarray, fake: np.ndarray) -> float:
    across = sum(_kernel(x, y).sum() for _, x, _, y in _pairs_across(real, fake)) / (len(real) * len(fake))
    return float(_mean_kernel_within(real) + _mean_kernel_within(fake) - 2 * across)


def _mean_kernel_within(features: np.ndarray) -> float:
    """Mean over all pairs of different images."""
    total = 0.0
    for rows, x, columns, y in _pairs_within(features):
        kernel = _kernel(x, y)
        total += kernel.sum() - np.trace(kernel) if rows == columns else 2 * kernel.sum()
    return total / (len(features) * (len(features) - 1))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # a power takes far longer


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL divergence of p(class | image) from p(class) (Salimans et al., arXiv 1606.03498).

    Args:
        logits: [N, classes], before the softmax.
        splits: consecutive parts, each scored alone, with sizes that differ by 1 at most. Images are not shuffled.

    Returns:
        Mean and standard deviation (divisor `splits`) of the scores of the parts.

    Raises:
        InputError: there are fewer images than parts, or a logit is not finite.
    """
    _check_features(logits, FAKE, least=splits)
    scores = [_score(part.astype(np.float64)) for part in np.array_split(logits, splits)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits: np.ndarray) -> float:
    """Of one part. Logarithms all along: a class that no image has must not give log(0)."""
    log_conditional = logits - _log_sum_exp(logits, axis=1)
    log_marginal = _log_sum_exp(log_conditional, axis=0) - np.log(len(logits))
    divergences = (np.exp(log_conditional) * (log_conditional - log_marginal)).sum(axis=1)
    return np.exp(divergences.mean())


def _log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    largest = values.max(axis=axis, keepdims=True)
    return largest + np.log(np.exp(values - largest).sum(axis=axis, keepdims=True))


def manifold_scores(
    real: np.ndarray,
    fake: np.ndarray,
    precision_k: int = 3,
    density_k: int = 5,
    on_block: Callable[[], object] = lambda: None,
) -> ManifoldScores:
    """Precision, recall (Kynkaanniemi et al., arXiv 1904.06991), density and coverage (Naeem et al., arXiv 2002.09797).

    Around each image lies a ball that reaches to its k-th nearest neighbor in its own set, itself not counted;
    distances are Euclidean. Precision: share of fake images in the ball of any real one. Recall: the reverse. Density:
    mean number of real balls that a fake image is in, divided by k. Coverage: share of real images whose ball holds
    any fake one. Balls include their surface, so that equal sets have precision, recall and coverage 1 even where
    images are repeated; with the surface, their density is (k + 1) / k or more.

    Args:
        real: [N, D].
        fake: [M, D].
        precision_k: neighbors for precision and recall.
        density_k: neighbors for density and coverage.
        on_block: called `count_blocks(N, M)` times, for a progress bar.

    Raises:
        InputError: a side has no k + 1 images or features that are not finite, or their dimensions differ.
    """
    most = max(precision_k, density_k)
    _check_sides(real, fake, least=most + 1)
    # Distances are differences of large numbers where all features share an offset.
    center = real.mean(axis=0, dtype=np.float64)
    real_radii = _squared_radii(real, center, most, on_block)
    fake_radii = _squared_radii(fake, center, precision_k, on_block)[:, -1]
    precise, recalled, covered = (np.zeros(count, bool) for count in (len(fake), len(real), len(real)))
    in_balls = 0
    for rows, x, columns, y in _pairs_across(real, fake, center):
        squared = _squared_distances(x, y)
        in_ball = squared <= real_radii[rows, density_k - 1, None]
        in_balls += np.count_nonzero(in_ball)
        covered[rows] |= in_ball.any(axis=1)
        precise[columns] |= (squared <= real_radii[rows, precision_k - 1, None]).any(axis=0)
        recalled[rows] |= (squared <= fake_radii[columns]).any(axis=1)
        on_block()
    density = in_balls / (density_k * len(fake))
    return ManifoldScores(float(precise.mean()), float(recalled.mean()), density, float(covered.mean()))


def count_blocks(real: int, fake: int) -> int:
    """How often `manifold_scores` calls `on_block` for these numbers of images."""
    a, b = -(-real // BLOCK), -(-fake // BLOCK)
    return a * (a + 1) // 2 + b * (b + 1) // 2 + a * b


def _squared_radii(features: np.ndarray, center: np.ndarray, k: int, on_block: Callable[[], object]) -> np.ndarray:
    """Squared distances [N, k] of each image to the k nearest others, rising.

    They are widened by what rounding can make of one distance, so that a point on the surface of a ball, as every
    duplicate of a neighbor is, never falls out of it: the bound for a product of rows, for distances up to the radius.
    """
    count, width = features.shape
    nearest = np.full((count, k), np.inf)
    for rows, x, columns, y in _pairs_within(features, center):
        squared = _squared_distances(x, y)
        if rows == columns:
            np.fill_diagonal(squared, np.inf)
        else:
            nearest[columns] = _smallest(nearest[columns], squared.T)
        nearest[rows] = _smallest(nearest[rows], squared)
        on_block()
    nearest.sort(axis=1)
    for rows, x in _blocks(features, center):
        nearest[rows] += 16 * width * np.finfo(np.float64).eps * (_squared_norms(x)[:, None] + nearest[rows])
    return nearest


def _smallest(known: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The smallest k values of each row of `known` [N, k] and `others` [N, n], in any order."""
    k = known.shape[1]
    return np.partition(np.concatenate([known, others], axis=1), k - 1, axis=1)[:, :k]


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x|^2 + |y|^2 - 2 x y; rounding can make it negative."""
    squared = x @ y.T
    squared *= -2
    squared += _squared_norms(x)[:, None]
    squared += _squared_norms(y)
    return squared


def _squared_norms(x: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", x, x)


def _blocks(
    features: np.ndarray, center: np.ndarray | float = 0.0, start: int = 0
) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows from `start` on, each block with where it lies, minus `center`, in float64."""
    for first in range(start, len(features), BLOCK):
        rows = slice(first, first + BLOCK)
        yield rows, np.subtract(features[rows], center, dtype=np.float64)


# Two places with the rows that lie there.
Pairs = Iterator[tuple[slice, np.ndarray, slice, np.ndarray]]


def _pairs_across(first: np.ndarray, second: np.ndarray, center: np.ndarray | float = 0.0) -> Pairs:
    for rows, x in _blocks(first, center):
        for columns, y in _blocks(second, center):
            yield rows, x, columns, y


def _pairs_within(features: np.ndarray, center: np.ndarray | float = 0.0) -> Pairs:
    """Each pair of blocks once, and each block with itself."""
    for rows, x in _blocks(features, center):
        yield rows, x, rows, x
        for columns, y in _blocks(features, center, start=rows.stop):
            yield rows, x, columns, y


def _check_sides(real: np.ndarray, fake: np.ndarray, least: int) -> None:
    _check_widths(real.shape[1], fake.shape[1])
    _check_features(real, REAL, least)
    _check_features(fake, FAKE, least)


def _check_widths(real: int, fake: int) -> None:
    if real != fake:
        raise InputError(
            f"the features of {REAL} have {real} dimensions and those of {FAKE} {fake}; make both with one extractor"
        )


def _check_features(features: np.ndarray, whose: str, least: int) -> None:
    if len(features) < least:
        raise InputError(f"there are {len(features)} of {whose} and at least {least} are needed; give more")
    for start in range(0, len(features), BLOCK):
        if not np.isfinite(features[start : start + BLOCK]).all():
            raise InputError(f"the features of {whose} hold NaN or infinite values; make them again")
