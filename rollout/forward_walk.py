"""A player that holds W: the walk of evaluate.py's section walk, and of record.py --forward in the game."""

import numpy as np

from dataset.actions import BLOCKED_METRES, MOVE_Z, YAW

TURN_AWAY, TURN_FRAMES = 60.0, 8  # degrees, and frames that they take


class ForwardPlayer:
    """Holds W. Held up for half a second it turns by TURN_AWAY degrees to the right, still walking."""

    def __init__(self, walks: int, rate: int, degrees_per_unit: float):
        """`rate` is the number of frames a second."""
        self.patience = rate // 2  # frames
        self.turning = np.zeros(walks, int)  # frames left to turn
        self.waited = np.zeros(walks, int)  # frames since the last turn
        self.yaw = TURN_AWAY / TURN_FRAMES / degrees_per_unit

    def __call__(self, metres: np.ndarray) -> np.ndarray:
        """Metres [N, t] moved by the frames so far, NaN where unknown -> actions [N, 5] of the next one."""
        moved = metres[:, -self.patience :].sum(1)  # NaN is not held up
        held_up = (self.waited >= self.patience) & (moved < BLOCKED_METRES * self.patience)
        self.turning[held_up] = TURN_FRAMES
        turns = self.turning > 0
        self.waited = np.where(turns, 0, self.waited + 1)
        self.turning = np.maximum(self.turning - 1, 0)
        actions = np.zeros((len(turns), 5), np.float32)
        actions[:, MOVE_Z] = 1.0
        actions[turns, YAW] = self.yaw
        return actions
