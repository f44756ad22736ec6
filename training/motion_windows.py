"""Windows of recorded play with the keyframes that a rollout would have kept before them, and rollouts of
the motion model on such windows, without pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataset.surroundings import decode_inverse_ray_distance
from geometry.keyframes import NEW_DEGREES, NEW_METRES
from geometry.motion import PlayerMotion, displacement_between, next_pose
from geometry.occupancy import Occupancy
from model_geometry import keys_and_turn

KEYFRAMES = 64  # newest keyframes before a window that it may be given


def observed_keyframes(pose: np.ndarray) -> np.ndarray:
    """The frames of a clip, by index, that are as far apart as observed keyframes (`Keyframes.add_observed`).

    pose [K, 5]. The first frame is one. A rollout also has the newest frame, whatever its distance.
    """
    kept, newest = [], None
    for k, now in enumerate(pose):
        if newest is not None:
            turned = np.abs((now[3:] - newest[3:] + 180) % 360 - 180).max()
            if not (turned > NEW_DEGREES or np.linalg.norm(now[:3] - newest[:3]) > NEW_METRES):
                continue
        kept.append(k)
        newest = now
    return np.array(kept, np.int64)


@dataclass
class MotionWindows:
    """B windows of T steps. Positions are relative to whole metres near each first frame.

    Keyframes are of frames before the model's own steps.
    """

    actions: Tensor  # [B, T, A]
    pose: Tensor  # [B, T+1, 5]
    inverse_ray_distance: Tensor  # [B, M, h, w] 1/m, of the keyframes
    frames: Tensor  # [B, M, 5] their poses, oldest first
    valid: Tensor  # [B, M] bool
    origin: Tensor  # [B, 3] float64, what was subtracted from the positions

    def __getitem__(self, index: slice | Tensor) -> "MotionWindows":
        """Some of the windows."""
        return MotionWindows(*(value[index] for value in vars(self).values()))

    def __len__(self) -> int:
        return len(self.actions)


class MotionClips:
    """Clips with actions, poses and depth, of which windows are made."""

    def __init__(
        self,
        actions: Sequence[np.ndarray],
        pose: Sequence[np.ndarray],
        depth: Sequence[np.ndarray | None],
        nodes: Sequence[np.ndarray | None] | None = None,
        origin: Sequence[np.ndarray | None] | None = None,
    ):
        """Of each clip: actions [K-1, A], pose [K, 5], depth [K, h, w] uint8 in the code of surroundings.py
        (only that of keyframes is read), and the recorded nodes [K, 7, 7, 7] with their origin [K, 3], where
        known. Clips without complete poses or without depth are in no window."""
        self.actions, self.pose, self.depth = list(actions), list(pose), list(depth)
        self.nodes = list(nodes) if nodes is not None else [None] * len(self.pose)
        self.origin = list(origin) if origin is not None else [None] * len(self.pose)
        self.with_pose = [c for c, p in enumerate(self.pose) if len(p) > 1 and np.isfinite(p).all()]
        self.usable = [c for c in self.with_pose if self.depth[c] is not None]
        self.with_nodes = [c for c in self.usable if self.nodes[c] is not None]
        self.keyframes = {c: observed_keyframes(self.pose[c]) for c in self.usable}

    def windows(self, starts: np.ndarray, steps: int, given: int | np.ndarray = 0) -> MotionWindows:
        """Windows [B, 2] of (clip, start) of `steps` steps, the first `given` of them recorded.

        Keyframes are of frames up to start + `given` (an array: each window's own; negative: the player has
        seen nothing new for so long). Steps beyond a clip's end are NaN.
        """
        seen = np.broadcast_to(given, len(starts))
        parts = [self.window(int(c), int(s), steps, int(g)) for (c, s), g in zip(starts, seen, strict=True)]
        actions, pose, depth, frames, valid, origin = (np.stack(part) for part in zip(*parts, strict=True))
        return MotionWindows(
            torch.from_numpy(actions),
            torch.from_numpy(pose),
            torch.from_numpy(decode_inverse_ray_distance(depth)),
            torch.from_numpy(frames),
            torch.from_numpy(valid),
            torch.from_numpy(origin),
        )

    def keyframes_before(self, clip: int, frame: int) -> np.ndarray:
        """The newest KEYFRAMES keyframes of a clip up to a frame, by index, oldest first."""
        keyframes = self.keyframes[clip]
        end = np.searchsorted(keyframes, frame, side="right")
        return keyframes[max(0, end - KEYFRAMES) : end]

    def window(self, clip: int, start: int, steps: int, given: int) -> tuple[np.ndarray, ...]:
        """The parts of one window in the order of `MotionWindows`, its depths still in their code."""
        actions = np.full((steps, self.actions[clip].shape[1]), np.nan, np.float32)
        pose = np.full((steps + 1, 5), np.nan, np.float64)
        known = self.actions[clip][start : start + steps]
        actions[: len(known)] = known
        pose[: len(known) + 1] = self.pose[clip][start : start + steps + 1]
        origin = np.round(pose[0, :3])
        pose[:, :3] -= origin
        kept = self.keyframes_before(clip, start + given)
        depth = np.zeros((KEYFRAMES, *self.depth[clip].shape[1:]), np.uint8)
        frames, valid = np.zeros((KEYFRAMES, 5), np.float64), np.zeros(KEYFRAMES, bool)
        depth[: len(kept)], valid[: len(kept)] = self.depth[clip][kept], True
        frames[: len(kept)] = self.pose[clip][kept]
        frames[: len(kept), :3] -= origin
        return actions, pose.astype(np.float32), depth, frames.astype(np.float32), valid, origin


@torch.no_grad()
def roll_out(
    motion: PlayerMotion, windows: MotionWindows, given: int, degrees_per_unit: float, fov: float
) -> Tensor:
    """Poses [B, T+1, 5] when the first `given` steps are recorded and the rest is the model's own.

    The rotation is always the recorded one, since it is known from the action. Only keyframes of `windows`
    are used.
    """
    state = motion.init_state(len(windows), windows.pose.device)
    pose, displacement = windows.pose[:, 0], torch.zeros_like(windows.pose[:, 0, :3])
    poses = [pose]
    for t in range(windows.actions.shape[1]):
        occupancy = motion.occupancy_around(
            windows.inverse_ray_distance, windows.frames, windows.valid, pose, fov
        )
        keys, turn = keys_and_turn(windows.actions[:, t].nan_to_num(), degrees_per_unit)
        step, state = motion(keys, turn, pose, displacement, state, occupancy)
        recorded = windows.pose[:, t + 1]
        following = next_pose(pose, torch.stack([turn, torch.zeros_like(turn)], 1), step)
        following = torch.cat(
            [following[:, :3], torch.where(recorded.isfinite(), recorded, following)[:, 3:]], 1
        )
        if t < given:
            following = recorded
        displacement = displacement_between(pose, following)
        pose = following
        poses.append(pose)
    return torch.stack(poses, 1)


def recorded_nodes(clips: MotionClips, starts: np.ndarray, occupancy: Occupancy, origin: Tensor) -> Tensor:
    """The recorded nodes [B, 7, 7, 7] uint8 of the boxes in `occupancy`, at frames [B, 2] of (clip, frame).

    All unknown (0) where the recorded box is another one. `origin` [B, 3] as in `MotionWindows`.
    """
    nodes = np.stack([clips.nodes[clip][frame] for clip, frame in starts])
    corner = np.stack([clips.origin[clip][frame] for clip, frame in starts])
    centre = occupancy.lowest.double().numpy() + 0.5 + origin.numpy()
    same = np.abs(centre - corner).max(1) < 0.51
    return torch.from_numpy(np.where(same[:, None, None, None], nodes, 0).astype(np.uint8))
