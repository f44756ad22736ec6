"""Statistics: confusion and F1, distances of distributions, collapse, and bootstrap intervals over clips."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

# A long rollout has collapsed outside these bounds, see `collapse_frame`.
COLLAPSE_CODES = 0.5, 2.0  # different codes in a frame over the recording's
COLLAPSE_DIVERGENCE = 0.5  # bits, of the codes used from the recording's
COLLAPSE_CHANGE = 0.1  # change between frames over the recording's


def confusion(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Confusion matrix of class indices [N]: counts [C, C], rows truth, columns predicted."""
    pairs = np.asarray(truth).astype(int) * classes + np.asarray(predicted).astype(int)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def macro_f1(confusion: np.ndarray) -> float:
    """Mean over classes of F1, the harmonic mean of precision and recall (van Rijsbergen 1979).

    confusion [C, C] -> 0..1, higher is better; rare classes have the same weight as frequent ones. Classes
    that occur neither in the truth nor in the predictions are left out; NaN if that leaves none.
    """
    right, total = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    occurs = total > 0
    return float((2 * right[occurs] / total[occurs]).mean()) if occurs.any() else math.nan


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features [N, D] and [M, D], each modelled as a Gaussian:
    |mean difference|^2 + tr(A + B - 2 (A B)^1/2) (FID, Heusel et al., arXiv 1706.08500).

    From 0 (the same mean and covariance); lower is better. It is biased upwards for few pictures: compare
    only sets of the same size. NaN where a set has fewer than two rows, or where a feature is not finite.
    """
    if min(len(a), len(b)) < 2 or not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    (mean_a, cov_a), (mean_b, cov_b) = (
        (features.mean(0), torch.atleast_2d(features.T.cov())) for features in (a.double(), b.double())
    )
    root = _square_root(cov_a)
    # A B has the eigenvalues of the symmetric A^1/2 B A^1/2.
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * mixed
    return float(distance.clamp_min(0))


def _square_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def jensen_shannon(counts_a: Tensor, counts_b: Tensor) -> float:
    """Jensen-Shannon divergence of two histograms [V], in bits (Lin, IEEE Trans. Inf. Theory 37(1), 1991).

    From 0 (equal distributions) to 1 (no common code); lower is better. NaN where a histogram is empty.
    """
    p, q = (counts.double() / counts.sum() for counts in (counts_a, counts_b))
    middle = torch.special.entr((p + q) / 2).sum()
    apart = (torch.special.entr(p).sum() + torch.special.entr(q).sum()) / 2
    return float((middle - apart).clamp_min(0)) / math.log(2)


def collapse_frame(
    codes_ratio: np.ndarray, divergence: np.ndarray, change_ratio: np.ndarray, window: int
) -> int:
    """The first frame of the first window in which a long rollout has collapsed; -1 if it never collapses.

    The series have one value per window of `window` frames: different codes in a frame over the recording's,
    Jensen-Shannon divergence of the codes used from the recording's in bits, and change between frames over
    the recording's. A rollout has collapsed when it uses fewer than half or more than twice as many different
    codes (COLLAPSE_CODES), other codes (COLLAPSE_DIVERGENCE), or hardly changes (COLLAPSE_CHANGE).
    """
    low, high = COLLAPSE_CODES
    codes_ratio, change_ratio = np.asarray(codes_ratio), np.asarray(change_ratio)
    collapsed = (codes_ratio < low) | (codes_ratio > high)
    collapsed |= (np.asarray(divergence) > COLLAPSE_DIVERGENCE) | (change_ratio < COLLAPSE_CHANGE)
    return int(collapsed.argmax()) * window if collapsed.any() else -1


def bootstrap_interval(
    sums: np.ndarray, weights: np.ndarray, seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a weighted mean over clips (Efron & Tibshirani 1993, chapter 13).

    `sums` [N] is each clip's sum of values and `weights` [N] its number of values: the mean is
    sums.sum() / weights.sum(). Whole clips are resampled, because the frames of a clip are correlated.
    Returns (low, high); (nan, nan) for a single clip.
    """
    if len(sums) < 2:
        return math.nan, math.nan
    chosen = _resampled(len(sums), resamples, seed)
    return _percentiles(np.asarray(sums)[chosen].sum(1) / np.asarray(weights)[chosen].sum(1), level)


def bootstrap_statistic(
    groups: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], float],
    seed: int,
    level: float = 0.95,
    resamples: int = 500,
) -> tuple[float, float]:
    """`bootstrap_interval` for any statistic: `groups` are the values of each clip; those of the resampled
    clips are concatenated."""
    if len(groups) < 2:
        return math.nan, math.nan
    chosen = _resampled(len(groups), resamples, seed)
    return _percentiles([statistic(np.concatenate([groups[i] for i in row])) for row in chosen], level)


def _resampled(clips: int, resamples: int, seed: int) -> np.ndarray:
    """Clip indices [resamples, clips], sampled with replacement."""
    return np.random.default_rng(seed).integers(0, clips, (resamples, clips))


def _percentiles(values: Sequence[float] | np.ndarray, level: float) -> tuple[float, float]:
    """The bounds of the middle share `level` of the values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
