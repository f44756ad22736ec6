"""Sections control, rotation and still: constant commands, rotations, and no action at all."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import metrics
from dataset.actions import (
    BLOCKED_METRES,
    CLASS_NAMES,
    DEGREES_PER_UNIT,
    JUMP,
    MOVE_X,
    MOVE_Z,
    PITCH,
    YAW,
    action_class,
    encode,
    wrap,
)
from evaluation.aggregate import Scores
from evaluation.evaluated_model import EvaluatedModel
from evaluation.held_out_clips import HeldOutClips, thin
from evaluation.plan import Plan
from evaluation.rollouts import HORIZONTAL, RADIAL, VERTICAL, flow_measures

FRAMES = 16  # of each command: one second
# Degrees per frame. Over FLOW_EVERY frames the optical flow can still follow them in recorded pictures.
TURN, LOOK = 2.0, 1.5
MIN_METRES, MIN_DEGREES = 2.0, 10.0  # a recorded second must move or turn more than this to show an effect
SAME_PLACE, SAME_VIEW = 0.5, 15.0  # metres and degrees around a start, within which that is blocked there too
MAX_PITCH = 30.0  # degrees from level at a start window, so that the camera can pitch up and down
AT_REST = 1e-3  # metres or degrees between two frames: below, nothing moved
SETTLE_SECONDS = 2  # in which a player that was walking or falling comes to rest


@dataclass(frozen=True)
class Command:
    """A constant command, and the sign that the flow measure `measure` must have under it."""

    yaw: float = 0.0  # degrees per frame
    pitch: float = 0.0
    move_x: float = 0.0
    move_z: float = 0.0
    jump: float = 0.0
    measure: int = 0  # index into `flow_measures`
    sign: int = 0

    def action(self, degrees_per_unit: float = DEGREES_PER_UNIT) -> Tensor:
        """The action vector [5]."""
        return torch.from_numpy(
            encode(self.yaw, self.pitch, self.move_x, self.move_z, self.jump, degrees_per_unit)
        )

    def succeeds(self, pictures: Tensor, every: int) -> np.ndarray:
        """Whether pictures [N, FRAMES+1, 3, Hp, Wp] move in the commanded direction: [N] bool.

        By the flow between every `every`-th frame.
        """
        flow = flow_measures(pictures[:, ::every])[..., self.measure]  # [N, FRAMES / every]
        if self.jump:  # a jump also falls: only its rise has the commanded sign
            flow = flow[:, : metrics.FLOW_EVERY // every]
        return metrics.flow_sign(flow.mean(1)) == self.sign


COMMANDS = {
    "forward": Command(move_z=1, measure=RADIAL, sign=1),
    "back": Command(move_z=-1, measure=RADIAL, sign=-1),
    "left": Command(move_x=-1, measure=HORIZONTAL, sign=1),
    "right": Command(move_x=1, measure=HORIZONTAL, sign=-1),
    "turn_left": Command(yaw=-TURN, measure=HORIZONTAL, sign=1),
    "turn_right": Command(yaw=TURN, measure=HORIZONTAL, sign=-1),
    "look_up": Command(pitch=-LOOK, measure=VERTICAL, sign=1),
    "look_down": Command(pitch=LOOK, measure=VERTICAL, sign=-1),
    "jump": Command(jump=1, measure=VERTICAL, sign=1),  # the ground moves down in the picture
    "idle": Command(),
}
PAIRS = {
    "turn": ("turn_left", "turn_right"),
    "look": ("look_up", "look_down"),
    "forward_back": ("forward", "back"),
    "strafe": ("left", "right"),
}
# How the flow is measured, by the suffix of the key: over FLOW_EVERY frames, and between neighbours.
FLOW_STEPS = {"": metrics.FLOW_EVERY, "_by_frame": 1}
# Rotations in degrees per frame (yaw, pitch): the whole range of an action.
ROTATIONS = {f"yaw{v}": (v, 0) for v in (2, 5, 10, 15)} | {f"pitch{v}": (0, v) for v in (3, 6)}
ROTATION_FRAMES = 6


def start_windows(held_out: HeldOutClips, plan: Plan) -> np.ndarray:
    """Windows [N, 2] of `plan.main_context` frames that commands start from: evenly spread, near level."""
    windows = held_out.windows(plan.main_context + 1, 4 * plan.start_windows)
    pitch = held_out.view_angles(windows, plan.main_context)[:, -1, 1].abs().numpy()
    level = windows[pitch < MAX_PITCH] if (pitch < MAX_PITCH).any() else windows
    return thin(level, plan.start_windows)


def control(
    held_out: HeldOutClips, evaluated: EvaluatedModel, plan: Plan, scores: Scores
) -> dict[str, Tensor]:
    """Whether constant commands move the picture in the right direction.

    `control.command.*`: share of the start windows, per command. `control.pairs.*`: share where both of two
    opposite commands succeed; a frozen world scores 0, one that moves at random 0.25. The flow is measured
    over FLOW_EVERY frames, as in the published protocol, which is wrong for some fast recorded motion;
    `control.command_by_frame.*` and `control.pairs_by_frame.*` measure it between neighbouring frames.

    `control.pairs_unblocked.*`, `control.pairs_unblocked_by_frame.*`: of walks and strafes, the same without
    the starts at which the recording blocks one of the two commands (`blocked_commands`);
    `control.blocked.*`: the share of such starts.

    `recording.control.*`: the same of decoded recorded seconds with a single command; of pairs, the product
    of the two shares.

    Returns pictures per command of some windows, every FLOW_EVERY frames: [n, K, 3, Hp, Wp].
    """
    windows = start_windows(held_out, plan)
    context, before, pose = held_out.clips.batch(windows, plan.main_context)
    last = held_out.decode(context[:, -1:])
    recorded = recorded_commands(held_out, plan)
    examples: dict[str, Tensor] = {}
    successes: dict[tuple[str, str, str], np.ndarray] = {}  # key prefix, key suffix, command -> [N] bool
    for name, command in COMMANDS.items():
        constant = command.action(held_out.degrees_per_unit).expand(len(windows), FRAMES, -1)
        generated = evaluated.rollout(context, torch.cat([before, constant], 1), pose, name)
        pictures = torch.cat([last, held_out.decode(generated)], 1)
        examples[name] = pictures[:: max(1, len(windows) // 4), :: metrics.FLOW_EVERY]
        if not command.sign:
            continue
        sources = [("", pictures, windows[:, 0])]
        if name in recorded:
            seconds = held_out.decode(held_out.clips.batch(recorded[name], FRAMES + 1)[0])
            sources.append(("recording.", seconds, recorded[name][:, 0]))
        for prefix, frames, clips in sources:
            for suffix, every in FLOW_STEPS.items():
                success = successes[prefix, suffix, name] = command.succeeds(frames, every)
                scores.mean(f"{prefix}control.command{suffix}.{name}", success, clips)
    for suffix in FLOW_STEPS:
        for pair, commands in PAIRS.items():
            first, second = (successes["", suffix, command] for command in commands)
            scores.mean(f"control.pairs{suffix}.{pair}", first & second, windows[:, 0])
            if all(command in recorded for command in commands):
                shares = [successes["recording.", suffix, command].mean() for command in commands]
                scores.add(f"recording.control.pairs{suffix}.{pair}", float(np.prod(shares)))
    report_unblocked(held_out, plan, windows, successes, scores)
    return examples


def report_unblocked(
    held_out: HeldOutClips,
    plan: Plan,
    windows: np.ndarray,
    successes: dict[tuple[str, str, str], np.ndarray],
    scores: Scores,
) -> None:
    """`control.pairs_unblocked.*` and `control.blocked.*` of `control`."""
    blocked = blocked_commands(held_out, windows, plan)
    for pair, commands in PAIRS.items():
        if not all(command in blocked for command in commands):
            continue
        free = ~np.logical_or(*(blocked[command] for command in commands))
        scores.mean(f"control.blocked.{pair}", ~free, windows[:, 0])
        for suffix in FLOW_STEPS:
            both = np.logical_and(*(successes["", suffix, command] for command in commands))
            scores.mean(f"control.pairs_unblocked{suffix}.{pair}", both[free], windows[free, 0])


def blocked_commands(held_out: HeldOutClips, windows: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    """At which starts the recording shows that an obstacle blocks a walk or strafe: command -> [N] bool.

    In two frames in a row of the context or the next second the keys of the command are held and the player
    moves less than BLOCKED_METRES, still within SAME_PLACE and SAME_VIEW of the start. So most obstacles,
    those that the recorded player did not touch, are missed. All False where poses were not recorded.
    """
    keys = {
        name: np.sign([command.move_x, command.move_z])
        for name, command in COMMANDS.items()
        if command.move_x or command.move_z
    }
    blocked = {name: np.zeros(len(windows), bool) for name in keys}
    for n, (clip, start) in enumerate(windows):
        at = start + plan.main_context - 1  # the frame that the commands start from
        near = slice(start, at + FRAMES)
        actions, pose = held_out.clips.actions[clip][near], held_out.clips.pose[clip]
        before = pose[start : start + len(actions)]
        step = np.linalg.norm(np.diff(pose[start : start + len(actions) + 1, :3], axis=0), axis=1)
        held_up = (step < BLOCKED_METRES) & (actions[:, JUMP] == 0)
        held_up &= np.linalg.norm(before[:, :3] - pose[at, :3], axis=1) < SAME_PLACE
        held_up &= np.abs(wrap(before[:, 3] - pose[at, 3])) < SAME_VIEW
        for name, wanted in keys.items():
            commanded = held_up & (np.sign(actions[:, [MOVE_X, MOVE_Z]]) == wanted).all(1)
            blocked[name][n] = (commanded[1:] & commanded[:-1]).any()
    return blocked


def recorded_commands(held_out: HeldOutClips, plan: Plan) -> dict[str, np.ndarray]:
    """Recorded seconds in which a single command was given and had an effect: command -> windows [N, 2].

    Rotations may have any speed up to twice the commanded one.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for clip, (actions, pose) in enumerate(zip(held_out.clips.actions, held_out.clips.pose, strict=True)):
        degrees = np.abs(actions[:, [YAW, PITCH]]) * held_out.degrees_per_unit
        limits = np.array([2 * TURN, 2 * LOOK])
        for name, command in COMMANDS.items():
            commanded = command.action(held_out.degrees_per_unit).numpy()
            same = (np.sign(actions) == np.sign(commanded)).all(1) & (degrees <= limits).all(1)
            free = 0  # the first frame after the last window found
            for start in range(len(actions) - FRAMES + 1):
                if start < free or not same[start : start + FRAMES].all():
                    continue
                walked = np.linalg.norm(pose[start + FRAMES, :3] - pose[start, :3])
                turned = degrees[start : start + FRAMES].sum()
                if max(walked / MIN_METRES, turned / MIN_DEGREES) > 1:
                    found.setdefault(name, []).append((clip, start))
                    free = start + FRAMES // 2
    return {name: thin(np.array(windows), plan.start_windows) for name, windows in found.items()}


def rotation(
    held_out: HeldOutClips, evaluated: EvaluatedModel, plan: Plan, scores: Scores
) -> dict[str, np.ndarray]:
    """How far the generated camera rotates, against the command, by `metrics.measure_turns`.

    `rotation.error_deg`: median distance from the commanded rotation in degrees per frame;
    `rotation.error_deg.yaw10` for one speed; `rotation.gain.yaw10`: median measured over commanded rotation.
    `recording.rotation.error_deg`: of recorded rotations, where it is the error of the method.

    Returns commanded and measured degrees [M] about the commanded axis, for the plot.
    """
    windows = start_windows(held_out, plan)
    context, before, pose = held_out.clips.batch(windows, plan.main_context)
    start_pitch = held_out.view_angles(windows, plan.main_context)[:, -1, 1].numpy()  # [N]
    last = held_out.decode(context[:, -1:])
    errors, clips, commanded, measured = [], [], [], []
    alternating = np.where(np.arange(len(windows)) % 2, 1, -1)
    towards_horizon = -np.where(start_pitch >= 0, 1, -1)
    for name, speed in ROTATIONS.items():
        axis = int(name.startswith("pitch"))
        sign = towards_horizon if axis else alternating
        command = sign[:, None] * np.array(speed)  # [N, 2] degrees of yaw and pitch
        action = torch.zeros(len(windows), 1, 5)
        action[:, 0, :2] = torch.from_numpy(command / held_out.degrees_per_unit)
        actions = torch.cat([before, action.expand(-1, ROTATION_FRAMES, -1)], 1)
        generated = held_out.decode(evaluated.rollout(context, actions, pose, name))
        pitch = start_pitch[:, None] + command[:, 1:] * np.arange(ROTATION_FRAMES)
        found = measured_rotations(torch.cat([last, generated], 1), pitch, held_out.fov)  # [N, T, 2]
        error = np.hypot(*np.moveaxis(found - command[:, None], -1, 0)).reshape(-1)
        gain = (found / np.where(command == 0, np.nan, command)[:, None])[..., axis].reshape(-1)
        clip = windows[:, 0].repeat(ROTATION_FRAMES)
        scores.statistic(f"rotation.error_deg.{name}", error, clip, np.median)
        scores.statistic(f"rotation.gain.{name}", gain, clip, np.median)
        errors.append(error)
        clips.append(clip)
        commanded.append(np.broadcast_to(command[:, None, axis], found.shape[:2]).reshape(-1))
        measured.append(found[..., axis].reshape(-1))
    scores.statistic("rotation.error_deg", np.concatenate(errors), np.concatenate(clips), np.median)
    _recorded_rotation(held_out, plan, scores)
    return {"commanded": np.concatenate(commanded), "measured": np.concatenate(measured)}


def _recorded_rotation(held_out: HeldOutClips, plan: Plan, scores: Scores) -> None:
    """`recording.rotation.error_deg`: of recorded rotations, in pictures decoded from their tokens."""
    pairs = thin(pairs_at_rest(held_out, turning=True), 4 * plan.start_windows)
    if not len(pairs):
        return
    tokens, _, pose = held_out.clips.batch(pairs, 2)
    angles = pose[..., 3:].numpy()
    found = measured_rotations(held_out.decode(tokens), angles[:, :1, 1], held_out.fov)
    error = np.hypot(*np.moveaxis(found - wrap(np.diff(angles, axis=1)), -1, 0)).reshape(-1)
    scores.statistic("recording.rotation.error_deg", error, pairs[:, 0], np.median)


def measured_rotations(pictures: Tensor, pitch: np.ndarray, fov: float) -> np.ndarray:
    """Rotations between neighbouring pictures: yaw and pitch in degrees [N, T, 2].

    pictures [N, T+1, 3, Hp, Wp]; pitch [N, T] in degrees before each step.
    """
    grey = metrics.grey(pictures)[:, :, None]
    before, after = grey[:, :-1].flatten(0, 1), grey[:, 1:].flatten(0, 1)
    found = metrics.measure_turns(before, after, pitch.reshape(-1), fov)
    return found[:, :2].reshape(*pitch.shape, 2)


def pairs_at_rest(held_out: HeldOutClips, turning: bool) -> np.ndarray:
    """Neighbouring recorded frames between which the player stood still: [N, 2] of (clip, first frame).

    With `turning` the camera rotated between them, without it did not. Empty where poses were not recorded.
    """
    found = []
    for clip, (actions, pose) in enumerate(zip(held_out.clips.actions, held_out.clips.pose, strict=True)):
        step = np.abs(np.diff(pose, axis=0))
        kind = action_class(actions)
        if turning:
            wanted = np.isin(kind, [CLASS_NAMES.index("turn"), CLASS_NAMES.index("look")])
            wanted &= (step[:, :3] < AT_REST).all(1)
        else:
            wanted = (kind == CLASS_NAMES.index("still")) & (step < AT_REST).all(1)
        found += [(clip, k) for k in np.flatnonzero(wanted)]
    return np.array(found).reshape(-1, 2)


def still_windows(held_out: HeldOutClips, plan: Plan) -> np.ndarray:
    """Recorded windows [N, 2]: `plan.main_context` frames, then FRAMES // 2 without action or motion."""
    pairs = pairs_at_rest(held_out, turning=False)
    length, found = FRAMES // 2, []
    for clip in np.unique(pairs[:, 0]):
        rest = np.zeros(held_out.lengths[clip] - 1, bool)
        rest[pairs[pairs[:, 0] == clip, 1]] = True
        runs = np.convolve(rest, np.ones(length), "valid") == length
        free = plan.main_context - 1  # the first frame after the last window found
        for start in np.flatnonzero(runs):
            if start >= free:
                found.append((clip, start - plan.main_context + 1))
                free = start + length
    return thin(np.array(found).reshape(-1, 2), plan.still_windows)


def standing_still(held_out: HeldOutClips, evaluated: EvaluatedModel, plan: Plan, scores: Scores) -> None:
    """Change of the picture while there is no action.

    `still.change`: mean change between frames; `still.flicker`: share of edges that appear or disappear;
    `recording.still.*` and `original.still.*`: the same of the decoded recording and of the original
    pictures of the same frames; `still.change_ratio`, `still.flicker_ratio`: over the decoded recording's.
    `still.long.*`: see `standing_still_long`.
    """
    standing_still_long(held_out, evaluated, plan, scores)
    windows = still_windows(held_out, plan)
    if not len(windows):
        return
    start, length = plan.main_context, FRAMES // 2
    tokens, actions, pose = held_out.clips.batch(windows, start + length)
    generated = evaluated.rollout(tokens[:, :start], actions, pose[:, :start], "standing still")
    # From the first generated frame on: its difference from the last recorded frame is no flicker.
    sources = {"": held_out.decode(generated), "recording.": held_out.decode(tokens[:, start:])}
    original_pictures = held_out.original_pictures(windows, start + np.arange(length))
    for name, measure in (("change", metrics.mean_change), ("flicker", metrics.edge_flicker)):
        for prefix, pictures in sources.items():
            scores.mean(f"{prefix}still.{name}", measure(pictures).numpy(), windows[:, 0])
        if original_pictures:
            values = torch.stack([measure(pictures) for pictures in original_pictures.values()])
            scores.mean(f"original.still.{name}", values.numpy(), windows[list(original_pictures), 0])
        scores.ratio(f"still.{name}_ratio", f"still.{name}", f"recording.still.{name}")


def standing_still_long(
    held_out: HeldOutClips, evaluated: EvaluatedModel, plan: Plan, scores: Scores
) -> None:
    """`still.long.*`: the view after `plan.still_seconds` without an action, against that after the first
    SETTLE_SECONDS of them.

    `agreement`: share of equal tokens; `psnr`; `codes_ratio`, `gradient_ratio`: different codes and spatial
    gradient over the earlier view's; `change`: share of cells whose token changes from frame to frame between
    the two, on average.
    """
    windows = thin(start_windows(held_out, plan), plan.still_starts)
    fps = round(held_out.manifest.fps)
    clips, frames = windows[:, 0], plan.still_seconds * fps
    context, before, pose = held_out.clips.batch(windows, plan.main_context)
    actions = torch.cat([before, torch.zeros(len(windows), frames, before.shape[2])], 1)
    generated = evaluated.rollout(context, actions, pose, f"standing still for {plan.still_seconds} s")
    generated = generated[:, SETTLE_SECONDS * fps :]
    first, last = generated[:, 0], generated[:, -1]
    view, start = held_out.decode(last), held_out.decode(first)
    values = {
        "agreement": metrics.token_accuracy(last, first),
        "psnr": metrics.psnr(view, start),
        "codes_ratio": metrics.codes_ratio(last, first),
        "gradient_ratio": metrics.spatial_gradient(view) / metrics.spatial_gradient(start),
        "change": metrics.flip_rate(generated[:, 1:], generated[:, :-1]).mean(1),
    }
    for name, value in values.items():
        scores.mean(f"still.long.{name}", value.numpy(), clips)
