"""Section motion: where the motion model takes the player under recorded actions, against where it went.

Only the motion model is rolled out, with the depth of keyframes recorded before the start: the pictures that
the world model generates after it do not matter. All labels come from recorded poses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.actions import BLOCKED_METRES, JUMP, MOVE_X, MOVE_Z, horizontal_metres
from depth.predictor import DepthPredictor
from evaluation.aggregate import Scores
from evaluation.evaluated_model import EvaluatedModel
from evaluation.held_out_clips import HeldOutClips, spread_windows, thin
from evaluation.plan import Plan
from geometry.motion import PlayerMotion, from_world
from training.motion_windows import MotionClips, MotionWindows, roll_out
from training.predicted_depth import fill_predicted_depth

HORIZONS = (8, 20)  # frames after the start at which the displacement is judged
BLOCKED_AFTER = 4  # frames into the rollout from which blocked steps are judged
DIRECTIONS = ("right", "up", "forward")
OBSTACLE_METRES = 5.0  # distance at which the player starts towards an obstacle, or along a free path
LEAST_METRES = 2.5  # a recorded approach may be shorter, but not shorter than this
STOPPED_FRAMES = 3  # blocked steps after which the recording counts as stopped
PUSHING_FRAMES = 8  # frames for which the key is held on after the recording has stopped; later it may slide
STOP_TOLERANCE = 0.3  # metres
STRAIGHT_DEGREES = 10.0  # most turn of a straight path
FREE_STEP = 0.2  # metres, least step of a free path
FREE_SHARE = 0.95  # of the recorded length that a free path must be walked
RISE_METRES, LANDING = 0.1, 16  # a step up by more is a jump or a step; frames after it
BATCH = 32  # windows that are rolled out together

RollOut = Callable[[MotionWindows, int], Tensor]  # (windows, given steps) -> poses [B, T+1, 5]


@dataclass(frozen=True)
class Chosen:
    """What is rolled out. Frames are those from which the model is on its own; `given` ones come before."""

    windows: np.ndarray  # [N, 2] clip, frame
    stops: np.ndarray  # [N, 3] clip, frame, steps: straight walks that end at an obstacle
    free: np.ndarray  # [N, 3] the same without an obstacle
    rises: np.ndarray  # [N, 2] clip, frame: a jump or a step up begins
    given: int

    @property
    def frames(self) -> np.ndarray:
        """All of them: [N, 2] of clip, frame."""
        return np.concatenate([self.windows, self.stops[:, :2], self.free[:, :2], self.rises])


@dataclass
class RecordedMotion:
    """What is rolled out, with the depth of its keyframes."""

    clips: MotionClips
    chosen: Chosen


def read(held_out: HeldOutClips, plan: Plan, predictor: DepthPredictor) -> RecordedMotion | None:
    """Chooses windows and paths, and predicts the depth of their keyframes from the decoded tokens.

    None if no clip has poses and is long enough.
    """
    size = [2 * n for n in held_out.manifest.latent_size]
    depth = [np.zeros((len(pose), *size), np.uint8) for pose in held_out.clips.pose]
    clips = MotionClips(held_out.clips.actions, held_out.clips.pose, depth)
    given = plan.main_context - 1
    if max((len(clips.pose[c]) for c in clips.usable), default=0) <= given + max(HORIZONS):
        return None
    chosen = choose(clips, given, plan.windows, plan.motion_paths, held_out.seed)
    fill_depth(clips, chosen.frames, held_out, predictor)
    return RecordedMotion(clips, chosen)


def report(
    held_out: HeldOutClips, evaluated: EvaluatedModel, recorded: RecordedMotion | None, scores: Scores
) -> None:
    """`measure` for the motion model of a world model; nothing if there is none or no poses are recorded."""
    motion = getattr(evaluated.model, "motion_model", None)
    if recorded is None or not isinstance(motion, PlayerMotion):
        return

    def rolled_out(windows: MotionWindows, given: int) -> Tensor:
        return roll_out(motion, windows, given, held_out.degrees_per_unit, held_out.fov)

    measure(recorded.clips, recorded.chosen, rolled_out, scores)


def choose(clips: MotionClips, given: int, count: int, paths: int, seed: int) -> Chosen:
    """`count` windows and rises, and `paths` paths of each kind, as far as there are so many."""
    lengths = [len(pose) if c in clips.usable else 0 for c, pose in enumerate(clips.pose)]
    windows = spread_windows(lengths, given + max(HORIZONS) + 1, count, seed)
    stops, free = straight_paths(clips, given)
    rises = rising_steps(clips, given)
    return Chosen(windows + [0, given], thin(stops, paths), thin(free, paths), thin(rises, count), given)


def fill_depth(
    clips: MotionClips, frames: np.ndarray, held_out: HeldOutClips, predictor: DepthPredictor
) -> None:
    """Predicts the depth of all keyframes that rollouts from `frames` [N, 2] of (clip, frame) read."""
    wanted: dict[int, set[int]] = {}
    for clip, frame in frames:
        wanted.setdefault(int(clip), set()).update(clips.keyframes_before(int(clip), int(frame)).tolist())
    total = sum(map(len, wanted.values()))
    with tqdm(total=total, desc="depth of keyframes", unit="frame", leave=False) as bar:
        for clip, numbers in wanted.items():
            fill_predicted_depth(
                clips.depth[clip],
                np.array(sorted(numbers)),
                held_out.clips.tokens[clip],
                clips.pose[clip],
                held_out.decode,
                predictor,
                bar,
            )


def measure(clips: MotionClips, chosen: Chosen, rolled_out: RollOut, scores: Scores) -> None:
    """`motion.*` of rollouts of `chosen`.

    `hN.error`: metres between the predicted and the recorded position after N frames, mean, and `hN.median`;
    `hN.right`, `hN.up`, `hN.forward`: of which in each direction, means; `blocked_f1`, `blocked_precision`,
    `blocked_recall`; `stops`: share of recorded stops at an obstacle within STOP_TOLERANCE; `free`: share of
    free paths that are walked to the end; `landing`: median vertical error LANDING frames after the beginning
    of a jump or step up.
    `*_count`: how many there are. `standing.motion.hN.*`: the same errors of a player that does not move.
    """
    given = chosen.given
    predicted, recorded, actions = run(
        clips, rolled_out, chosen.windows - [0, given], given + max(HORIZONS), given
    )
    report_displacement(scores, chosen.windows[:, 0], predicted, recorded, given)
    report_blocked(scores, predicted, recorded, actions, given)
    report_paths(scores, "stops", clips, rolled_out, chosen.stops, given)
    report_paths(scores, "free", clips, rolled_out, chosen.free, given)
    if len(chosen.rises):
        predicted, recorded, _ = run(clips, rolled_out, chosen.rises - [0, given], given + LANDING, given)
        error = (predicted[:, -1, 1] - recorded[:, -1, 1]).abs().numpy()
        scores.statistic("motion.landing", error, chosen.rises[:, 0], lambda e: float(np.median(e)))
        scores.add("motion.landing_count", len(error))


def run(
    clips: MotionClips, rolled_out: RollOut, starts: np.ndarray, steps: int, given: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted and recorded poses [N, steps+1, 5] and actions [N, steps, A] of windows [N, 2]."""
    parts = []
    for first in range(0, len(starts), BATCH):
        windows = clips.windows(starts[first : first + BATCH], steps, given)
        parts.append((rolled_out(windows, given), windows.pose, windows.actions))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def report_displacement(
    scores: Scores, clip: np.ndarray, predicted: Tensor, recorded: Tensor, given: int
) -> None:
    """`motion.hN.*` of poses [N, T+1, 5]; directions relative to the recorded yaw at the horizon."""
    for horizon in HORIZONS:
        at = given + horizon
        for name, poses in (("", predicted[:, at]), ("standing.", recorded[:, given])):
            error = from_world((poses - recorded[:, at])[:, :3], recorded[:, at, 3])
            key = f"{name}motion.h{horizon}"
            scores.mean(f"{key}.error", error.norm(dim=1).numpy(), clip)
            scores.statistic(f"{key}.median", error.norm(dim=1).numpy(), clip, lambda e: float(np.median(e)))
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


def straight_paths(clips: MotionClips, given: int) -> tuple[np.ndarray, np.ndarray]:
    """Recorded walks straight forward, [N, 3] of (clip, frame, steps): those that end at an obstacle, and
    those over OBSTACLE_METRES that nothing stops."""
    stops, free = [], []
    for clip in clips.usable:
        pose, actions = clips.pose[clip], clips.actions[clip]
        step = horizontal_metres(pose)
        forward = (actions[:, MOVE_Z] > 0.5) & (np.abs(actions[:, MOVE_X]) < 0.5) & (actions[:, JUMP] < 0.5)
        walked = np.concatenate([[0.0], step.cumsum()])
        pushes = forward & (step < BLOCKED_METRES)
        used = given
        for k in range(given + 1, len(step) - STOPPED_FRAMES):
            if pushes[k : k + STOPPED_FRAMES].all() and not pushes[k - 1] and k > used:
                start = first_of_straight(pose, forward, walked, k, used)
                if walked[k] - walked[start] >= LEAST_METRES:
                    stops.append((clip, start, k - start))
                    used = k
        k = given
        while k < len(step):
            end = int(np.searchsorted(walked, walked[k] + OBSTACLE_METRES))
            walks = end < len(pose) and forward[k:end].all() and (step[k + 2 : end] > FREE_STEP).all()
            if walks and turned(pose[k : end + 1]) < STRAIGHT_DEGREES:
                free.append((clip, k, end - k))
                k = end
            k += 4
    return np.array(stops, np.int64).reshape(-1, 3), np.array(free, np.int64).reshape(-1, 3)


def first_of_straight(pose: np.ndarray, forward: np.ndarray, walked: np.ndarray, end: int, least: int) -> int:
    """The frame from which the player walks straight to frame `end`, at most OBSTACLE_METRES before it."""
    start = end
    while (
        start > least
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
    scores: Scores, name: str, clips: MotionClips, rolled_out: RollOut, paths: np.ndarray, given: int
) -> None:
    """`motion.stops` or `motion.free` of paths [N, 3] of (clip, frame, steps), and their number."""
    if not len(paths):
        return
    pushing = PUSHING_FRAMES if name == "stops" else 0
    right = []
    for first in range(0, len(paths), BATCH):
        part = paths[first : first + BATCH]
        windows = clips.windows(part[:, :2] - [0, given], given + int(part[:, 2].max()) + pushing, given)
        end = torch.from_numpy(given + part[:, 2])
        rows, time = torch.arange(len(part)), torch.arange(windows.actions.shape[1])
        goal, origin = windows.pose[rows, end, :3], windows.pose[:, given, :3]
        # The last command of the walk is held on, without a turn.
        after = (time >= end[:, None])[..., None]
        held = windows.actions[rows, end - 1][:, None] * windows.actions.new_tensor([0.0, 0, 1, 1, 0])
        windows.actions = torch.where(after, held, windows.actions)
        windows.pose[:, 1:] = torch.where(after, torch.nan, windows.pose[:, 1:])
        reached = rolled_out(windows, given)[rows, end + pushing, :3]
        away = (goal - origin)[:, [0, 2]]
        length = away.norm(dim=1)
        along = ((reached - origin)[:, [0, 2]] * away).sum(1) / length
        if name == "stops":
            right.append((along - length).abs() <= STOP_TOLERANCE)
        else:
            right.append(along >= FREE_SHARE * length)
    scores.mean(f"motion.{name}", torch.cat(right).numpy(), paths[:, 0])
    scores.add(f"motion.{name}_count", len(paths))


def rising_steps(clips: MotionClips, given: int) -> np.ndarray:
    """[N, 2] of (clip, frame): a player that stood rises from there, by a jump or a step; not within LANDING
    frames of another such frame."""
    found = []
    for clip in clips.usable:
        rise = np.diff(clips.pose[clip][:, 1].astype(np.float64))
        last = -LANDING
        for k in range(given + 1, len(rise) - LANDING):
            if rise[k] > RISE_METRES and abs(rise[k - 1]) < 1e-3 and k - last >= LANDING:
                found.append((clip, k))
                last = k
    return np.array(found, np.int64).reshape(-1, 2)
