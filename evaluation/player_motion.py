"""Section motion: where the motion model takes the player under recorded actions, against where it went.

Only the motion model is rolled out, with the depth of keyframes recorded before the start: the pictures that
the world model generates after it do not matter. All labels come from recorded poses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataset.actions import JUMP, MOVE_X, MOVE_Z
from evaluation.aggregate import Scores
from evaluation.held_out_clips import spread_windows, thin
from training.motion_windows import MotionClips, MotionWindows

HORIZONS = (8, 20)  # frames after the start at which the displacement is judged
BLOCKED_METRES = 0.05  # a step with a key held that is shorter counts as blocked
BLOCKED_AFTER = 4  # frames into the rollout from which blocked steps are judged
DIRECTIONS = ("right", "up", "forward")
OBSTACLE_METRES = 5.0  # distance at which the player starts towards an obstacle, or along a free path
LEAST_METRES = 2.5  # a recorded approach may be shorter, but not shorter than this
STOPPED_FRAMES = 3  # blocked steps after which the recording counts as stopped
PUSHING_FRAMES = 16  # frames for which the keys are held on after the recording has stopped
STOP_TOLERANCE = 0.3  # metres
STRAIGHT_DEGREES = 10.0  # most turn of a straight path
FREE_SHARE = 0.95  # of the recorded length that a path must reach to count as free
RISE_METRES, LANDING = 0.1, 16  # a step up by more is a jump or a step; frames after it
BATCH = 32

RollOut = Callable[[MotionWindows, int], Tensor]  # (windows, given steps) -> poses [B, T+1, 5]


@dataclass(frozen=True)
class Path:
    """A straight recorded walk: `frames` steps of `clip` from `start` on."""

    clip: int
    start: int
    frames: int


def measure(clips: MotionClips, roll_out: RollOut, given: int, count: int, seed: int, scores: Scores) -> dict:
    """`motion.*`; returns what was rolled out, for pictures.

    `given` recorded steps before each start, `count` windows. `hN.error`: metres between the predicted and
    the recorded position after N frames; `hN.right`, `hN.up`, `hN.forward`: of which in each direction;
    `blocked_f1`, `blocked_precision`, `blocked_recall`; `stops`: share of recorded stops at an obstacle
    within STOP_TOLERANCE; `free`: share of free paths that are walked to the end; `landing`: median vertical
    error LANDING frames after a jump or step up. `standing.*`: the same errors if the player were to stay.
    """
    lengths = [len(pose) if c in clips.usable else 0 for c, pose in enumerate(clips.pose)]
    steps = given + max(HORIZONS)
    starts = spread_windows(lengths, steps + 1, count, seed)
    predicted, recorded, actions = run(clips, roll_out, starts, steps, given)
    report_displacement(scores, starts[:, 0], predicted, recorded, given)
    report_blocked(scores, predicted, recorded, actions, given)
    found = straight_paths(clips, given)
    for name, paths in zip(("stops", "free"), found, strict=True):
        chosen = thin(np.array([(p.clip, p.start, p.frames) for p in paths]).reshape(-1, 3), 40)
        if len(chosen):
            report_paths(scores, name, clips, roll_out, chosen, given)
    rises = np.array(rising_steps(clips, given)).reshape(-1, 2)
    rises = thin(rises, count)
    if len(rises):
        predicted, recorded, _ = run(clips, roll_out, rises - [0, given], given + LANDING, given)
        error = (predicted[:, -1, 1] - recorded[:, -1, 1]).abs().numpy()
        scores.add("motion.landing", float(np.median(error)))
        scores.add("motion.landing_count", len(error))
    return {"starts": starts}


def run(
    clips: MotionClips, roll_out: RollOut, starts: np.ndarray, steps: int, given: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted and recorded poses [N, steps+1, 5] and actions [N, steps, A] of windows [N, 2]."""
    parts = []
    for first in range(0, len(starts), BATCH):
        windows = clips.windows(starts[first : first + BATCH], steps, given)
        parts.append((roll_out(windows, given), windows.pose, windows.actions))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def report_displacement(
    scores: Scores, clip: np.ndarray, predicted: Tensor, recorded: Tensor, given: int
) -> None:
    """`motion.hN.*` of poses [N, T+1, 5]; directions relative to the recorded yaw at the horizon."""
    for horizon in HORIZONS:
        at = given + horizon
        yaw = torch.deg2rad(recorded[:, at, 3])
        for name, poses in (("", predicted[:, at]), ("standing.", recorded[:, given])):
            x, up, z = (poses - recorded[:, at])[:, :3].unbind(1)
            right, forward = -yaw.cos() * x - yaw.sin() * z, -yaw.sin() * x + yaw.cos() * z
            error = torch.stack([right, up, forward], 1)
            key = f"{name}motion.h{horizon}"
            scores.mean(f"{key}.error", error.norm(dim=1).numpy(), clip)
            for direction, value in zip(DIRECTIONS, error.abs().unbind(1), strict=True):
                scores.mean(f"{key}.{direction}", value.numpy(), clip)


def report_blocked(scores: Scores, predicted: Tensor, recorded: Tensor, actions: Tensor, given: int) -> None:
    """`motion.blocked_*`: steps with a key held that move the player less than BLOCKED_METRES."""
    first = given + BLOCKED_AFTER
    held = (actions[:, first:, [MOVE_X, MOVE_Z]].abs() > 0.5).any(-1)
    short = [
        (poses[:, first + 1 :, :3] - poses[:, first:-1, :3]).norm(dim=-1) < BLOCKED_METRES
        for poses in (predicted, recorded)
    ]
    found, true = (held & s for s in short)
    both = int((found & true).sum())
    precision, recall = both / max(1, int(found.sum())), both / max(1, int(true.sum()))
    scores.add("motion.blocked_precision", precision)
    scores.add("motion.blocked_recall", recall)
    scores.add("motion.blocked_f1", 2 * precision * recall / max(1e-9, precision + recall))
    scores.add("motion.blocked_count", int(true.sum()))


def level_steps(pose: np.ndarray) -> np.ndarray:
    """Horizontal metres of each step of poses [K, 5]: [K-1]."""
    moved = np.diff(pose[:, :3].astype(np.float64), axis=0)
    return np.hypot(moved[:, 0], moved[:, 2])


def straight_paths(clips: MotionClips, given: int) -> tuple[list[Path], list[Path]]:
    """Recorded walks straight forward that end at an obstacle, and those over OBSTACLE_METRES that do not."""
    stops, free = [], []
    for clip in clips.usable:
        pose, actions = clips.pose[clip], clips.actions[clip]
        step = level_steps(pose)
        forward = (actions[:, MOVE_Z] > 0.5) & (np.abs(actions[:, MOVE_X]) < 0.5) & (actions[:, JUMP] < 0.5)
        walked = np.concatenate([[0.0], step.cumsum()])
        used = 0
        for k in range(given, len(step) - STOPPED_FRAMES):
            blocked = (
                forward[k : k + STOPPED_FRAMES].all()
                and (step[k : k + STOPPED_FRAMES] < BLOCKED_METRES).all()
            )
            if blocked and k > used and step[k - 1] >= BLOCKED_METRES:
                start = first_of_straight(pose, forward, walked, k, given)
                if walked[k] - walked[start] >= LEAST_METRES and start >= used:
                    stops.append(Path(clip, start, k - start))
                    used = k
        k = given
        while k < len(step):
            end = int(np.searchsorted(walked, walked[k] + OBSTACLE_METRES))
            straight = end < len(pose) and forward[k:end].all() and (step[k + 2 : end] > 0.2).all()
            if straight and turned(pose[k : end + 1]) < STRAIGHT_DEGREES:
                free.append(Path(clip, k, end - k))
                k = end
            k += 4
    return stops, free


def first_of_straight(pose: np.ndarray, forward: np.ndarray, walked: np.ndarray, end: int, given: int) -> int:
    """The frame from which the player walks straight to frame `end`, at most OBSTACLE_METRES before it."""
    start = end
    while (
        start > given
        and forward[start - 1]
        and walked[end] - walked[start - 1] <= OBSTACLE_METRES
        and turned(pose[start - 1 : end + 1]) < STRAIGHT_DEGREES
    ):
        start -= 1
    return start


def turned(pose: np.ndarray) -> float:
    """Range of the yaw of poses [K, 5] in degrees."""
    return float(np.ptp(np.degrees(np.unwrap(np.radians(pose[:, 3])))))


def report_paths(
    scores: Scores, name: str, clips: MotionClips, roll_out: RollOut, paths: np.ndarray, given: int
) -> None:
    """`motion.stops` or `motion.free`, with the number of paths [N, 3] of (clip, start, frames)."""
    right = []
    pushing = PUSHING_FRAMES if name == "stops" else 0
    for clip, start, frames in paths:
        windows = clips.windows(np.array([(clip, start - given)]), given + frames + pushing, given)
        if pushing:
            # The last recorded command of the walk is held on, without a turn.
            windows.actions[:, given + frames :] = windows.actions[:, given + frames - 1 : given + frames]
            windows.actions[:, given + frames :, :2] = 0
            windows.pose[:, given + frames + 1 :] = torch.nan
        predicted = roll_out(windows, given)[0, :, :3].double()
        origin, goal = windows.pose[0, given, :3].double(), windows.pose[0, given + frames, :3].double()
        if name == "stops":
            along = (goal - origin)[[0, 2]]
            along = along / along.norm()
            beyond = ((predicted[-1] - goal)[[0, 2]] * along).sum()
            right.append(bool(beyond.abs() <= STOP_TOLERANCE))
        else:
            length = (predicted[-1] - origin)[[0, 2]].norm() / (goal - origin)[[0, 2]].norm()
            right.append(bool(length >= FREE_SHARE))
    scores.mean(f"motion.{name}", np.array(right, float), paths[:, 0])
    scores.add(f"motion.{name}_count", len(right))


def rising_steps(clips: MotionClips, given: int) -> list[tuple[int, int]]:
    """(clip, frame) from which a player that stood rises, by a jump or a step, not within LANDING frames of
    another."""
    found = []
    for clip in clips.usable:
        rise = np.diff(clips.pose[clip][:, 1].astype(np.float64))
        last = -LANDING
        for k in range(given + 1, len(rise) - LANDING):
            if rise[k] > RISE_METRES and abs(rise[k - 1]) < 1e-3 and k - last >= LANDING:
                found.append((clip, k))
                last = k
    return found
