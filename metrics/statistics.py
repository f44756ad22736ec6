"""Distances of distributions, F1, and bootstrap intervals over clips."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

COLLAPSE_CODES, COLLAPSE_DIVERGENCE, COLLAPSE_CHANGE = (0.5, 2.0), 0.5, 0.1


def confusion(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """How often each class [N] was taken for each: counts [C, C], rows truth, columns predicted."""
    pairs = np.asarray(truth).astype(int) * classes + np.asarray(predicted).astype(int)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def macro_f1(confusion: np.ndarray) -> float:
    """Mean over classes of F1, the harmonic mean of precision and recall (van Rijsbergen 1979).

    confusion [C, C] -> 0..1, higher is better; every class counts alike, however rare. Classes that occur
    neither in truth nor in predictions are left out; NaN if that leaves none.
    """
    right, total = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    there = total > 0
    return float((2 * right[there] / total[there]).mean()) if there.any() else math.nan


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features [N, D] and [M, D], each taken for a Gaussian:
    |mean difference|^2 + tr(A + B - 2 (A B)^1/2) (FID, Heusel et al., arXiv 1706.08500).

    From 0 (the same mean and covariance), lower is better. Few pictures make it larger: compare only sets of
    the same size. NaN where a set has fewer than two rows (no covariance), or features that are not numbers.
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
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def jensen_shannon(counts_a: Tensor, counts_b: Tensor) -> float:
    """Jensen-Shannon divergence of two histograms [V], in bits (Lin, IEEE Trans. Inf. Theory 37(1), 1991).

    From 0 (the same shares) to 1 (nothing in common); lower is better. NaN where a histogram is empty.
    """
    p, q = (counts.double() / counts.sum() for counts in (counts_a, counts_b))
    middle = torch.special.entr((p + q) / 2).sum()
    apart = (torch.special.entr(p).sum() + torch.special.entr(q).sum()) / 2
    return float((middle - apart).clamp_min(0)) / math.log(2)


def collapse_frame(
    codes_ratio: np.ndarray, divergence: np.ndarray, change_ratio: np.ndarray, window: int
) -> int:
    """The first frame of the first window in which a long rollout has collapsed; -1 if it never does.

    One value for each window of `window` frames: different codes in a frame over the truth's, Jensen-Shannon
    divergence of the codes used from the truth's in bits, change between frames over the truth's. The rule: a
    rollout has collapsed when it uses fewer than half or more than twice as many different codes as the truth
    (COLLAPSE_CODES), other codes (COLLAPSE_DIVERGENCE), or hardly changes any more (COLLAPSE_CHANGE).
    """
    low, high = COLLAPSE_CODES
    codes_ratio, change_ratio = np.asarray(codes_ratio), np.asarray(change_ratio)
    collapsed = (codes_ratio < low) | (codes_ratio > high)
    collapsed |= (np.asarray(divergence) > COLLAPSE_DIVERGENCE) | (change_ratio < COLLAPSE_CHANGE)
    return int(collapsed.argmax()) * window if collapsed.any() else -1


def bootstrap_interval(
    sums: np.ndarray, weights: np.ndarray, seed: int, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a weighted mean over clips (Efron & Tibshirani 1993, chapter 13).

    `sums` [N] is each clip's sum of values and `weights` [N] how many values it gave: the mean is
    sums.sum() / weights.sum(). Whole clips are drawn again, because the frames of one are alike.
    -> (low, high). One clip says nothing about the spread between clips: (nan, nan).
    """
    if len(sums) < 2:
        return math.nan, math.nan
    chosen = _draws(len(sums), draws, seed)
    return _percentiles(np.asarray(sums)[chosen].sum(1) / np.asarray(weights)[chosen].sum(1), level)


def bootstrap_statistic(
    groups: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], float],
    seed: int,
    level: float = 0.95,
    draws: int = 500,
) -> tuple[float, float]:
    """`bootstrap_interval` for any statistic: `groups` are each clip's values, joined when drawn."""
    if len(groups) < 2:
        return math.nan, math.nan
    chosen = _draws(len(groups), draws, seed)
    return _percentiles([statistic(np.concatenate([groups[i] for i in row])) for row in chosen], level)


def _draws(clips: int, draws: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, clips, (draws, clips))


def _percentiles(values: Sequence[float] | np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
