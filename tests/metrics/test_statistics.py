"""F1, distances of distributions, collapse, and bootstrap intervals."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics import (
    bootstrap_interval,
    bootstrap_statistic,
    collapse_frame,
    confusion,
    frechet_distance,
    jensen_shannon,
    macro_f1,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_confusion_counts_truth_in_rows():
    counts = confusion(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), classes=4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_macro_f1_weighs_classes_equally():
    assert macro_f1(np.diag([90, 5, 5])) == 1
    # Class 0: 90 correct, 10 false positives: F1 180/190. Class 1 is never predicted: 0.
    assert macro_f1(np.array([[90, 0], [10, 0]])) == pytest.approx(180 / 190 / 2)
    # Precision 1/2 and recall 1; precision 1 and recall 1/2; class 2 occurs nowhere.
    assert macro_f1(np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]])) == pytest.approx(2 / 3)
    assert math.isnan(macro_f1(np.zeros((3, 3), int)))


def test_macro_f1_of_guesses_is_chance():
    rng = np.random.default_rng(0)
    assert macro_f1(confusion(*rng.integers(0, 5, (2, 20_000)), 5)) == pytest.approx(1 / 5, abs=0.01)


def spread(covariance: list[list[float]], mean: list[float], n: int = 50) -> Tensor:
    """[N, D] with exactly this mean and covariance."""
    x = torch.randn(n, len(mean), generator=seeded(), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.atleast_2d(x.T.cov()))).T
    return x @ torch.linalg.cholesky(torch.tensor(covariance).double()).T + torch.tensor(mean).double()


def test_frechet_distance_of_known_gaussians():
    unit = [[1.0, 0.0], [0.0, 1.0]]
    a = spread(unit, [0, 0])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, spread(unit, [3, 4], n=80)) == pytest.approx(25)
    # Independent axes: the sum of the squared differences of the standard deviations.
    assert frechet_distance(a, spread([[9.0, 0.0], [0.0, 4.0]], [0, 0])) == pytest.approx(
        (3 - 1) ** 2 + (2 - 1) ** 2
    )
    line = spread([[4.0]], [1.0])
    assert frechet_distance(line, spread([[0.25]], [3.0])) == pytest.approx(2**2 + 1.5**2)


def test_frechet_distance_of_correlated_gaussians_is_the_formula():
    """The trace of a 2x2 root: tr(M^1/2)^2 = tr M + 2 sqrt(det M)."""
    one, two = [[2.0, 0.9], [0.9, 1.0]], [[1.0, -0.5], [-0.5, 3.0]]
    product = np.array(one) @ np.array(two)
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = 1 + np.trace(one) + np.trace(two) - 2 * root
    a, b = spread(one, [0, 0]), spread(two, [0, 1])
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_frechet_distance_of_degenerate_sets():
    """With fewer rows than columns the covariance is singular."""
    a = torch.randn(5, 20, generator=seeded())
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, a + 1) == pytest.approx(20, rel=1e-4)
    assert math.isnan(frechet_distance(a[:1], a))
    assert math.isnan(frechet_distance(a * math.nan, a)), "NaN features are not a perfect result"


def test_jensen_shannon():
    counts = torch.tensor([3, 1, 0, 0])
    assert jensen_shannon(counts, 7 * counts) == pytest.approx(0, abs=1e-9)
    assert jensen_shannon(counts, counts.flip(0)) == pytest.approx(1)
    # Entropy of (3/4, 1/4) minus the mean of the entropies of (1, 0) and (1/2, 1/2).
    expected = 0.75 * math.log2(4 / 3) + 0.25 * 2 - 0.5
    assert jensen_shannon(torch.tensor([5, 0]), torch.tensor([1, 1])) == pytest.approx(expected)
    assert jensen_shannon(torch.tensor([1, 1]), torch.tensor([5, 0])) == pytest.approx(expected)
    assert math.isnan(jensen_shannon(torch.zeros(4), counts))


@pytest.mark.parametrize(
    "codes, divergence, change",
    [(0.4, 0.1, 1.0), (2.1, 0.1, 1.0), (1.0, 0.6, 1.0), (1.0, 0.1, 0.05)],
    ids=["few codes", "noise", "other codes", "frozen"],
)
def test_collapse_frame_is_the_start_of_the_first_collapsed_window(codes, divergence, change):
    good = 0.6, 0.4, 0.2  # bad, but no collapse
    series = np.array([good, good, (codes, divergence, change), good]).T
    assert collapse_frame(*series, window=32) == 64
    assert collapse_frame(*series[:, ::-1], window=32) == 32
    assert collapse_frame(*series[:, :2], window=32) == -1


def test_bootstrap_interval_of_clips_that_agree_is_narrow():
    weights = np.array([10.0, 20.0, 30.0])
    assert bootstrap_interval(0.7 * weights, weights, seed=0) == pytest.approx((0.7, 0.7))


def test_bootstrap_interval_has_the_theoretical_width_and_is_reproducible():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = bootstrap_interval(values, np.ones(400), seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert (low, high) == bootstrap_interval(values, np.ones(400), seed=1)
    assert (low, high) != bootstrap_interval(values, np.ones(400), seed=2)


def test_one_clip_has_no_interval():
    assert all(math.isnan(bound) for bound in bootstrap_interval(np.ones(1), np.ones(1), seed=0))
    assert all(math.isnan(bound) for bound in bootstrap_statistic([np.ones(9)], np.mean, seed=0))


def test_bootstrap_statistic_of_a_mean_is_bootstrap_interval():
    values = np.random.default_rng(0).normal(5.0, 2.0, (30, 4))
    interval = bootstrap_interval(values.sum(1), np.full(30, 4.0), seed=3, resamples=400)
    assert bootstrap_statistic(list(values), np.mean, seed=3, resamples=400) == pytest.approx(interval)


def test_bootstrap_statistic_resamples_whole_clips_of_any_length_and_shape():
    """Repeating the frames of a clip does not narrow the interval."""
    rng = np.random.default_rng(0)
    levels = rng.normal(0, 1, 40)
    short, long = ([np.full((n, 2), level) for level in levels] for n in (1, 50))
    median = bootstrap_statistic(short, np.median, seed=0)
    assert bootstrap_statistic(long, np.median, seed=0) == pytest.approx(median)
    assert median[0] < np.median(levels) < median[1] and median[1] - median[0] > 0.3
    mixed = [np.ones(int(n)) for n in rng.integers(1, 9, 10)]
    assert bootstrap_statistic(mixed, np.mean, seed=0) == (1.0, 1.0)
