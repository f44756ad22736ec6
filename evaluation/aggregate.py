"""Collects the metrics of a run under flat names: means over windows, with intervals over clips."""

from collections.abc import Callable, Sequence

import numpy as np

from metrics import bootstrap_interval, bootstrap_statistic


class Scores:
    """Flat `metrics` and, where there is more than one clip, `ci95`: 95 % bootstrap intervals over clips.

    A metric without any value, or with NaN only, has no entry.
    """

    def __init__(self, seed: int):
        """`seed` is that of the bootstrap."""
        self.seed = seed
        self.metrics: dict[str, float] = {}
        self.ci95: dict[str, list[float]] = {}

    def add(self, key: str, value: float, interval: tuple[float, float] = (np.nan, np.nan)) -> None:
        """Adds a number, and its interval if both bounds are finite."""
        if np.isfinite(value):
            self.metrics[key] = float(value)
            if np.isfinite(interval).all():
                self.ci95[key] = [float(bound) for bound in interval]

    def mean(
        self, key: str, values: np.ndarray, clips: np.ndarray, weights: np.ndarray | None = None
    ) -> None:
        """Adds the mean of values [N, ...] from the clips [N], over all axes. NaN counts as missing.

        With `weights` [N] the values are sums, and the mean is sum(values) / sum(weights).
        """
        if not len(clips):
            return
        values = np.asarray(values, np.float64).reshape(len(clips), -1)
        valid = ~np.isnan(values)
        sums = np.where(valid, values, 0).sum(1)
        counts = valid.sum(1) if weights is None else np.asarray(weights, np.float64)
        groups = [np.asarray(clips) == clip for clip in np.unique(clips)]
        by_clip = np.array([(sums[g].sum(), counts[g].sum()) for g in groups]).reshape(-1, 2)
        by_clip = by_clip[by_clip[:, 1] > 0]
        if len(by_clip):
            interval = bootstrap_interval(by_clip[:, 0], by_clip[:, 1], self.seed)
            self.add(key, by_clip[:, 0].sum() / by_clip[:, 1].sum(), interval)

    def statistic(
        self, key: str, values: np.ndarray, clips: np.ndarray, statistic: Callable[[np.ndarray], float]
    ) -> None:
        """Adds a statistic of values [N, ...] from the clips [N]. Rows with NaN are left out."""
        values, clips = np.asarray(values), np.asarray(clips)
        valid = ~np.isnan(values.reshape(len(values), -1)).any(1) if len(values) else np.zeros(0, bool)
        values, clips = values[valid], clips[valid]
        if len(values):
            groups: Sequence[np.ndarray] = [values[clips == clip] for clip in np.unique(clips)]
            self.add(key, statistic(values), bootstrap_statistic(groups, statistic, self.seed))

    def ratio(self, key: str, numerator: str, denominator: str) -> None:
        """Adds the ratio of two metrics, if both exist and the denominator is not 0."""
        if numerator in self.metrics and self.metrics.get(denominator):
            self.add(key, self.metrics[numerator] / self.metrics[denominator])
