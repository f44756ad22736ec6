"""Numbers of a run: values of windows become means with intervals over clips, under flat names."""

from collections.abc import Callable, Sequence

import numpy as np

from metrics import bootstrap_interval, bootstrap_statistic


class Scores:
    """Flat `metrics` and, for those that have them, `ci95`: 95 % intervals by bootstrap over clips.

    What could not be measured (no value, or only NaN) gets no entry.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.metrics: dict[str, float] = {}
        self.ci95: dict[str, list[float]] = {}

    def add(self, key: str, value: float, interval: tuple[float, float] = (np.nan, np.nan)) -> None:
        """A number as it is."""
        if np.isfinite(value):
            self.metrics[key] = float(value)
            if np.isfinite(interval).all():
                self.ci95[key] = [float(bound) for bound in interval]

    def mean(
        self, key: str, values: np.ndarray, clips: np.ndarray, weights: np.ndarray | None = None
    ) -> None:
        """The mean of values [N] (any further axes are averaged as well) that came from `clips` [N].

        NaN counts as not there. With `weights` [N] the values are sums: sum(values) / sum(weights).
        """
        if not len(clips):
            return
        values = np.asarray(values, np.float64).reshape(len(clips), -1)
        there = ~np.isnan(values)
        sums = np.where(there, values, 0).sum(1)
        counts = there.sum(1) if weights is None else np.asarray(weights, np.float64)
        groups = [np.asarray(clips) == clip for clip in np.unique(clips)]
        by_clip = np.array([(sums[g].sum(), counts[g].sum()) for g in groups]).reshape(-1, 2)
        by_clip = by_clip[by_clip[:, 1] > 0]
        if len(by_clip):
            interval = bootstrap_interval(by_clip[:, 0], by_clip[:, 1], self.seed)
            self.add(key, by_clip[:, 0].sum() / by_clip[:, 1].sum(), interval)

    def statistic(
        self, key: str, values: np.ndarray, clips: np.ndarray, statistic: Callable[[np.ndarray], float]
    ) -> None:
        """A statistic of the values [N, ...] that came from `clips` [N]. Rows with NaN are left out."""
        values, clips = np.asarray(values), np.asarray(clips)
        there = ~np.isnan(values.reshape(len(values), -1)).any(1) if len(values) else np.zeros(0, bool)
        values, clips = values[there], clips[there]
        if len(values):
            groups: Sequence[np.ndarray] = [values[clips == clip] for clip in np.unique(clips)]
            self.add(key, statistic(values), bootstrap_statistic(groups, statistic, self.seed))

    def ratio(self, key: str, of: str, over: str) -> None:
        """One number over another, where both are there."""
        if of in self.metrics and self.metrics.get(over):
            self.add(key, self.metrics[of] / self.metrics[over])
