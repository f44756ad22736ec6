"""Notices that a rollout has lost its detail, and takes it back to where the picture was good.

A picture has lost its detail when over a second, while the player walks or turns, it shows few different
codes and hardly changes. Either alone is common: a wall or the sky has few codes, but they change as one
moves; a player who stands still sees no change. Few is by the recorded frames of the start, so that a start
in a uniform scene is not interrupted.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

import metrics
from rollout.rollout import Rollout

DETAIL = 0.4  # different codes over those of the recorded frames; below it there are few
CHANGE = 0.2  # share of the codes that change between two frames; below it hardly any
ACTING = 0.5  # of the frames of the second; with fewer its change says nothing
GOOD = 0.6  # different codes over those of the recorded frames, of a second that can be gone back to
SNAPSHOTS = 4  # kept, about a second apart, and the start
SETTLED_SECONDS = 2.0  # what came later than this before the player is told is not gone back to


class DetailWatch:
    """Different codes and change over the last second of one world."""

    def __init__(self, recorded: Tensor, fps: float):
        """`recorded` [K, H, W]: the tokens of the context, K >= 1; the last ones come before those given."""
        self.reference = float(metrics.unique_codes(recorded).float().mean())
        self.previous = recorded[-1].cpu()
        second = max(1, round(fps))
        self.codes: deque[float] = deque(maxlen=second)  # over the reference
        self.change: deque[float] = deque(maxlen=second)  # NaN for a frame without an action

    def add(self, tokens: Tensor, acts: bool) -> None:
        """The tokens [H, W] of the next frame, and whether an action led to it."""
        tokens = tokens.cpu()
        self.codes.append(float(metrics.unique_codes(tokens[None])) / self.reference)
        changed = float((tokens != self.previous).float().mean())
        self.change.append(changed if acts else np.nan)
        self.previous = tokens

    def restart(self, tokens: Tensor) -> None:
        """Goes on after a frame [H, W] that does not follow the last one."""
        self.codes.clear()
        self.change.clear()
        self.previous = tokens.cpu()

    @property
    def is_full(self) -> bool:
        """Whether a second has passed since the start or the last `restart`."""
        return len(self.codes) == self.codes.maxlen

    @property
    def detail(self) -> float:
        """Mean of the different codes over the reference; NaN before the first frame."""
        return float(np.mean(self.codes)) if self.codes else np.nan

    @property
    def lost(self) -> bool:
        """Whether the picture has lost its detail."""
        moved = np.array(self.change)[np.isfinite(self.change)]
        if not self.is_full or len(moved) < ACTING * len(self.change):
            return False
        return self.detail < DETAIL and moved.mean() < CHANGE


@dataclass(frozen=True)
class Snapshot:
    """A rollout as it was after a number of steps."""

    rollout: Rollout
    step: int
    extra: Any


class Recovery:
    """Watches a rollout of one world and takes it back."""

    def __init__(self, rollout: Rollout, recorded: Tensor, fps: float, extra: Any = None):
        """To be made when the rollout has been primed on the `recorded` tokens [K, H, W]. `extra` is what the
        caller has to take back with the rollout; it is returned by `go_back`."""
        self.rollout, self.fps = rollout, fps
        self.watched = DetailWatch(recorded, fps)
        self.start = Snapshot(rollout.copy(), 0, extra)
        self.snapshots: deque[Snapshot] = deque(maxlen=SNAPSHOTS)
        self.step = 0  # steps since the start on the way to the current frame

    def watch(self, acts: bool, extra: Any = None) -> bool:
        """After each step: whether the picture has lost its detail. `acts`: an action led to it; `extra`: as
        at the start."""
        self.step += 1
        self.watched.add(self.rollout.tokens[0], acts)
        newest = self.snapshots[-1].step if self.snapshots else 0
        if self.watched.is_full and self.watched.detail >= GOOD and self.step >= newest + round(self.fps):
            self.snapshots.append(Snapshot(self.rollout.copy(), self.step, extra))
        return self.watched.lost

    def go_back(self) -> tuple[int, Any]:
        """Takes the rollout back to a good frame, at least SETTLED_SECONDS ago -> the number of steps undone,
        and `extra` of then.

        A second call soon after goes back further, in the end to the start. The random numbers go on, so that
        the same actions need not lead to the same picture.
        """
        snapshot = self.start
        while self.snapshots:
            newest = self.snapshots.pop()
            if newest.step <= self.step - SETTLED_SECONDS * self.fps:
                snapshot = newest
                break
        undone, self.step = self.step - snapshot.step, snapshot.step
        self.rollout.go_back_to(snapshot.rollout)
        self.watched.restart(self.rollout.tokens[0])
        return undone, snapshot.extra
