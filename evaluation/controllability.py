"""Section 3, the commanded half, and section 4: constant commands, turns, standing still."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import metrics
from dataset.actions import CLASS_NAMES, DEGREES_PER_UNIT, PITCH, YAW, action_class, encode, wrap
from evaluation.aggregate import Scores
from evaluation.held_out_clips import HeldOutClips, Plan, Subject, thin
from evaluation.rollouts import flow_of

FRAMES = 16  # of each command: one second
TURN, LOOK = 2.0, 1.5  # degrees a frame: as far in FLOW_EVERY frames as the flow follows in recorded pictures
ENOUGH_METRES, ENOUGH_DEGREES = 2.0, 10.0  # a recorded second that moves or turns less shows no effect
LEVEL = 30.0  # degrees: places whose pitch is farther from level are not used, so that looking has room
UNMOVED = 1e-3  # metres or degrees between two frames of a camera at rest


@dataclass(frozen=True)
class Command:
    """A constant command and what it must do to the picture: `sign` of number `kind` of `flow_of`."""

    yaw: float = 0.0  # degrees a frame
    pitch: float = 0.0
    move_x: float = 0.0
    move_z: float = 0.0
    jump: float = 0.0
    kind: int = 0
    sign: int = 0

    def action(self, degrees_per_unit: float = DEGREES_PER_UNIT) -> Tensor:
        """[5]"""
        turn = self.yaw, self.pitch
        return torch.from_numpy(encode(*turn, self.move_x, self.move_z, self.jump, degrees_per_unit))

    def seen_in(self, pictures: Tensor, every: int) -> np.ndarray:
        """[N] bool: do pictures [N, FRAMES+1, 3, Hp, Wp] move as commanded, by the flow in `every` frames?"""
        flow = flow_of(pictures[:, ::every])[..., self.kind]  # [N, FRAMES/every]
        if self.jump:  # who jumps comes down again: only the rise tells
            flow = flow[:, : metrics.FLOW_EVERY // every]
        return metrics.flow_sign(flow.mean(1)) == self.sign


HORIZONTAL, RADIAL, VERTICAL = 1, 2, 3  # places in what flow_of returns
COMMANDS = {
    "forward": Command(move_z=1, kind=RADIAL, sign=1),
    "back": Command(move_z=-1, kind=RADIAL, sign=-1),
    "left": Command(move_x=-1, kind=HORIZONTAL, sign=1),
    "right": Command(move_x=1, kind=HORIZONTAL, sign=-1),
    "turn_left": Command(yaw=-TURN, kind=HORIZONTAL, sign=1),
    "turn_right": Command(yaw=TURN, kind=HORIZONTAL, sign=-1),
    "look_up": Command(pitch=-LOOK, kind=VERTICAL, sign=1),
    "look_down": Command(pitch=LOOK, kind=VERTICAL, sign=-1),
    "jump": Command(jump=1, kind=VERTICAL, sign=1),  # of the first stretch: who rises sees the ground sink
    "nothing": Command(),
}
PAIRS = {
    "turn": ("turn_left", "turn_right"),
    "look": ("look_up", "look_down"),
    "forward_back": ("forward", "back"),
    "strafe": ("left", "right"),
}
# Degrees a frame about one axis, FRAMES_TURNING each: the whole range of a step.
TURNS = {f"yaw{v}": (v, 0) for v in (2, 5, 10, 15)} | {f"pitch{v}": (0, v) for v in (3, 6)}
FRAMES_TURNING = 6


def places(held: HeldOutClips, plan: Plan) -> np.ndarray:
    """Windows [N, 2] of `plan.main` frames from which commands start: spread evenly, looking near level."""
    windows = held.windows(plan.main + 1, 4 * plan.starts)
    pitch = held.turned(windows, plan.main)[:, -1, 1].abs().numpy()
    level = windows[pitch < LEVEL] if (pitch < LEVEL).any() else windows
    return thin(level, plan.starts)


def obey(held: HeldOutClips, subject: Subject, plan: Plan, scores: Scores) -> dict[str, Tensor]:
    """`obey.pairs.*`: share of places where both of two opposite commands move the picture the right way (a
    frozen world scores 0, one that moves at random 0.25), `obey.command.*` for each alone; `.real`: the same
    of recorded seconds in which one thing was done, for pairs the product of the two.

    By the flow over FLOW_EVERY frames, as in the published protocol. That misjudges some recorded seconds,
    for steps move the ground far; `obey.pairs_by_frame.*` takes the flow between neighbouring frames.

    -> pictures of each command at some places, every FLOW_EVERY frames, [n, K, 3, Hp, Wp].
    """
    windows = places(held, plan)
    seen, before = held.batch(windows, plan.main)
    last = held.decode(seen[:, -1:])
    shown: dict[str, Tensor] = {}
    right: dict[str, dict[str, np.ndarray]] = {}  # "" or ".real" and how measured -> command -> [N] bool
    real = recorded_commands(held, plan)
    for name, command in COMMANDS.items():
        constant = command.action(held.degrees_per_unit).expand(len(windows), FRAMES, -1)
        generated = subject.rollout(
            seen, torch.cat([before, constant], 1), held.pose(windows, plan.main), name
        )
        pictures = torch.cat([last, held.decode(generated)], 1)
        shown[name] = pictures[:: max(1, len(windows) // 4), :: metrics.FLOW_EVERY]
        if name == "nothing":
            continue
        sources = [("", pictures, windows[:, 0])]
        if name in real:
            recorded = held.decode(held.batch(real[name], FRAMES + 1)[0])
            sources.append((".real", recorded, real[name][:, 0]))
        for suffix, frames, clips in sources:
            for way, every in (("", metrics.FLOW_EVERY), ("_by_frame", 1)):
                good = command.seen_in(frames, every)
                right.setdefault(way + suffix, {})[name] = good
                scores.mean(f"obey.command{way}.{name}{suffix}", good, clips)
    for way in ("", "_by_frame"):
        for name, (one, other) in PAIRS.items():
            scores.mean(f"obey.pairs{way}.{name}", right[way][one] & right[way][other], windows[:, 0])
            alone = [right.get(f"{way}.real", {}).get(command) for command in (one, other)]
            if all(good is not None for good in alone):
                scores.add(f"obey.pairs{way}.{name}.real", float(np.prod([good.mean() for good in alone])))
    return shown


def recorded_commands(held: HeldOutClips, plan: Plan) -> dict[str, np.ndarray]:
    """Recorded seconds in which one of the commands and nothing else was done, and had an effect: name ->
    windows [N, 2]. Turns may be of any speed up to twice the commanded one."""
    found: dict[str, list[tuple[int, int]]] = {}
    for clip, (actions, pose) in enumerate(zip(held.clips.actions, held.clips.pose, strict=True)):
        degrees = np.abs(actions[:, [YAW, PITCH]]) * held.degrees_per_unit
        limits = np.array([2 * TURN, 2 * LOOK])
        for name, command in COMMANDS.items():
            asked = command.action(held.degrees_per_unit).numpy()
            # The same signs as commanded, all along.
            same = (np.sign(actions) == np.sign(asked)).all(1) & (degrees <= limits).all(1)
            free = 0
            for start in range(len(actions) - FRAMES + 1):
                if start < free or not same[start : start + FRAMES].all():
                    continue
                walked = np.linalg.norm(pose[start + FRAMES, :3] - pose[start, :3])
                turned = degrees[start : start + FRAMES].sum()
                if max(walked / ENOUGH_METRES, turned / ENOUGH_DEGREES) > 1:
                    found.setdefault(name, []).append((clip, start))
                    free = start + FRAMES // 2
    return {name: thin(np.array(windows), plan.starts) for name, windows in found.items()}


def turn(held: HeldOutClips, subject: Subject, plan: Plan, scores: Scores) -> dict[str, np.ndarray]:
    """`obey.rotation_deg_median`: how far the camera turned in each generated pair, by the best rotation
    homography, from what was commanded, in degrees; by speed as `obey.rotation_deg.yaw10`, and the share of
    the commanded turn that is seen as `obey.rotation_gain.yaw10`. `.real` is the same of recorded turns,
    where it is the method's own error.

    -> commanded and measured degrees [M] each, about the commanded axis, for the plot.
    """
    windows = places(held, plan)
    seen, before = held.batch(windows, plan.main)
    level = held.turned(windows, plan.main)[:, -1, 1].numpy()  # pitch [N]
    last = held.decode(seen[:, -1:])
    errors, clips, commanded, measured = [], [], [], []
    side = np.where(np.arange(len(windows)) % 2, 1, -1)
    for name, speed in TURNS.items():
        sign = -np.where(level >= 0, 1, -1) if name.startswith("pitch") else side  # look towards the horizon
        asked = sign[:, None] * np.array(speed)  # [N, 2] degrees of yaw and pitch
        action = torch.zeros(len(windows), 1, 5)
        action[:, 0, :2] = torch.from_numpy(asked / held.degrees_per_unit)
        actions = torch.cat([before, action.expand(-1, FRAMES_TURNING, -1)], 1)
        made = held.decode(subject.rollout(seen, actions, held.pose(windows, plan.main), name))
        pitch = level[:, None] + asked[:, 1:] * np.arange(FRAMES_TURNING)
        found = rotations(torch.cat([last, made], 1), pitch, held.fov)  # [N, FRAMES_TURNING, 2]
        error = np.hypot(*np.moveaxis(found - asked[:, None], -1, 0))
        where = windows[:, 0].repeat(FRAMES_TURNING)
        scores.statistic(f"obey.rotation_deg.{name}", error.reshape(-1), where, np.median)
        axis = int(name.startswith("pitch"))
        gain = (found / np.where(asked == 0, np.nan, asked)[:, None])[..., axis]
        scores.statistic(f"obey.rotation_gain.{name}", gain.reshape(-1), where, np.median)
        errors.append(error.reshape(-1))
        clips.append(where)
        commanded.append(np.broadcast_to(asked[:, None, axis], found.shape[:2]).reshape(-1))
        measured.append(found[..., axis].reshape(-1))
    scores.statistic("obey.rotation_deg_median", np.concatenate(errors), np.concatenate(clips), np.median)
    real_turns(held, plan, scores)
    return {"commanded": np.concatenate(commanded), "measured": np.concatenate(measured)}


def rotations(pictures: Tensor, pitch: np.ndarray, fov: float) -> np.ndarray:
    """[N, T+1, 3, Hp, Wp] and the pitch [N, T] before each step -> yaw and pitch in degrees [N, T, 2]."""
    grey = metrics.grey(pictures)[:, :, None]
    found = metrics.measure_turns(
        grey[:, :-1].flatten(0, 1), grey[:, 1:].flatten(0, 1), pitch.reshape(-1), fov
    )
    return found[:, :2].reshape(*pitch.shape, 2)


def pairs_at_rest(held: HeldOutClips, turning: bool) -> np.ndarray:
    """Recorded pairs [N, 2] of (clip, first frame) between which the player stood, and with `turning` the
    camera turned, else did not. Empty where poses were not recorded."""
    found = []
    for clip, (actions, pose) in enumerate(zip(held.clips.actions, held.clips.pose, strict=True)):
        step = np.abs(np.diff(pose, axis=0))
        kind = action_class(actions)
        if turning:
            wanted = np.isin(kind, [CLASS_NAMES.index("turn"), CLASS_NAMES.index("look")])
            wanted &= (step[:, :3] < UNMOVED).all(1)
        else:
            wanted = (kind == CLASS_NAMES.index("still")) & (step < UNMOVED).all(1)
        found += [(clip, k) for k in np.flatnonzero(wanted)]
    return np.array(found).reshape(-1, 2)


def real_turns(held: HeldOutClips, plan: Plan, scores: Scores) -> None:
    """`obey.rotation_deg_median.real`: the same of recorded turns, decoded from their tokens."""
    pairs = thin(pairs_at_rest(held, turning=True), 4 * plan.starts)
    if not len(pairs):
        return
    pose = held.pose(pairs, 2).numpy()
    turned = wrap(np.diff(pose[..., 3:], axis=1))
    found = rotations(held.decode(held.batch(pairs, 2)[0]), pose[:, :1, 4], held.fov)
    error = np.hypot(*np.moveaxis(found - turned, -1, 0)).reshape(-1)
    scores.statistic("obey.rotation_deg_median.real", error, pairs[:, 0], np.median)


# ---------------------------------------------------------------- standing still


def still_windows(held: HeldOutClips, plan: Plan) -> np.ndarray:
    """Recorded stretches [N, 2]: `plan.main` frames, then FRAMES // 2 in which nobody does anything."""
    pairs = pairs_at_rest(held, turning=False)
    long, found = FRAMES // 2, []
    for clip in np.unique(pairs[:, 0]):
        rest = np.zeros(held.lengths[clip] - 1, bool)
        rest[pairs[pairs[:, 0] == clip, 1]] = True
        runs = np.convolve(rest, np.ones(long), "valid") == long
        free = plan.main - 1  # the first frame that no window has used yet
        for start in np.flatnonzero(runs):
            if start >= free:
                found.append((clip, start - plan.main + 1))
                free = start + long
    return thin(np.array(found).reshape(-1, 2), plan.still)


def stand(held: HeldOutClips, subject: Subject, plan: Plan, scores: Scores) -> None:
    """`still.change_ratio` and `still.flicker_ratio`: change between frames, and share of edges that come and
    go, while nothing is done, over those of the decoded recording of the same moment.

    `still.change`, `still.flicker` are the values themselves, `.truth` those of the decoded recording and
    `.real` those of the true pictures.
    """
    windows = still_windows(held, plan)
    if not len(windows):
        return
    long = FRAMES // 2
    tokens, actions = held.batch(windows, plan.main + long)
    generated = subject.rollout(
        tokens[:, : plan.main], actions, held.pose(windows, plan.main), "standing still"
    )
    # The first generated frame is left out: how it differs from the last true one is another matter.
    made, truth = held.decode(generated), held.decode(tokens[:, plan.main :])
    real = dict(held.true_pictures(windows, plan.main + np.arange(long)))
    for name, kind in (("change", metrics.mean_change), ("flicker", metrics.edge_flicker)):
        scores.mean(f"still.{name}", kind(made).numpy(), windows[:, 0])
        scores.mean(f"still.{name}.truth", kind(truth).numpy(), windows[:, 0])
        if real:
            values = torch.stack([kind(pictures) for pictures in real.values()])
            scores.mean(f"still.{name}.real", values.numpy(), windows[list(real), 0])
        scores.ratio(f"still.{name}_ratio", f"still.{name}", f"still.{name}.truth")
