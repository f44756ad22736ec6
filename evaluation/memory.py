"""Section memory: the camera turns away and back. Is the view it returns to the one that it left?"""

import numpy as np
import torch
from torch import Tensor

import metrics
from evaluation.aggregate import Scores
from evaluation.controllability import start_windows
from evaluation.evaluated_model import EvaluatedModel
from evaluation.held_out_clips import HeldOutClips, thin
from evaluation.picture_networks import PictureNetworks
from evaluation.plan import Plan
from geometry import camera

ANGLES = (30, 60, 90, 180)  # degrees away
SPEED = 6.0  # degrees per frame
ANGLE_RANGES = {30: (20, 45), 60: (45, 75), 90: (75, 135), 180: (135, 361)}  # of recorded look-aways
MAX_FRAMES = 96  # of a recorded look-away
SAME_ANGLE, SAME_PLACE = 2.0, 0.25  # degrees and metres: the camera is back


def measure(
    held_out: HeldOutClips, evaluated: EvaluatedModel, plan: Plan, networks: PictureNetworks, scores: Scores
) -> dict[int, Tensor]:
    """`memory.degN.*` for each of ANGLES: the view after turning away and back, against the view left.

    `token_agreement`, `psnr`, `perceptual`. `idle_agreement`: the view after as many frames without an
    action; `relative`: token_agreement over idle_agreement. `out_of_view_*`: the same, of the cells that are
    out of view at the far end. `away_agreement`: the view at the far end. If that is as high as
    token_agreement, the world ignores the turn and has remembered nothing.

    Returns the tokens of each angle, from the view left on: [N, frames, H, W].
    """
    windows = thin(start_windows(held_out, plan), plan.memory_windows)
    clips = windows[:, 0]
    context, before, pose = held_out.clips.batch(windows, plan.main_context)
    left = context[:, -1]
    angles = held_out.view_angles(windows, plan.main_context)[:, -1]
    pose_left = torch.cat([torch.zeros(len(windows), 3), angles], 1)
    sign = torch.where(torch.arange(len(windows)) % 2 == 0, 1.0, -1.0)
    idle_actions = torch.zeros(len(windows), 2 * round(max(ANGLES) / SPEED), 5)
    idle = evaluated.rollout(context, torch.cat([before, idle_actions], 1), pose, "without turning")
    rollouts = {}
    for angle in ANGLES:
        away = round(angle / SPEED)
        turn = torch.zeros(len(windows), 2 * away, 5)
        turn[:, :away, 0] = sign[:, None] * SPEED / held_out.degrees_per_unit
        turn[:, away:, 0] = -turn[:, :away, 0]
        actions = torch.cat([before, turn], 1)
        generated = evaluated.rollout(context, actions, pose, f"{angle} degrees and back")
        rollouts[angle] = torch.cat([left[:, None], generated], 1)
        pose_away = pose_left.clone()
        pose_away[:, 3] += sign * angle
        _, in_view = camera.reproject(pose_away, pose_left, 0.0, *left.shape[-2:], held_out.fov)
        key = f"memory.deg{angle}"
        report_agreement(scores, key, clips, left, generated, idle[:, : 2 * away], ~in_view)
        pictures = held_out.decode(generated[:, -1]), held_out.decode(left)
        report_pictures(scores, key, clips, *pictures, networks)
    measure_look_aways(held_out, evaluated, plan, networks, scores)
    return rollouts


def report_agreement(
    scores: Scores,
    key: str,
    clips: np.ndarray,
    left: Tensor,
    generated: Tensor,
    idle: Tensor,
    out_of_view: Tensor,
) -> None:
    """Agreement of tokens with the view left [N, H, W], of the rollouts `generated` and `idle` [N, K, H, W].

    `out_of_view` [N, H, W] bool.
    """
    cells = out_of_view.sum((1, 2)).numpy()
    for prefix, tokens in (("", generated[:, -1]), ("idle_", idle[:, -1])):
        name = f"{prefix}agreement" if prefix else "token_agreement"
        scores.mean(f"{key}.{name}", metrics.token_accuracy(tokens, left).numpy(), clips)
        same = ((tokens == left) & out_of_view).sum((1, 2)).numpy()
        scores.mean(f"{key}.out_of_view_{prefix}agreement", same, clips, cells)
    scores.ratio(f"{key}.relative", f"{key}.token_agreement", f"{key}.idle_agreement")
    scores.ratio(
        f"{key}.out_of_view_relative", f"{key}.out_of_view_agreement", f"{key}.out_of_view_idle_agreement"
    )
    away = generated[:, generated.shape[1] // 2 - 1]
    scores.mean(f"{key}.away_agreement", metrics.token_accuracy(away, left).numpy(), clips)


def report_pictures(
    scores: Scores,
    key: str,
    clips: np.ndarray,
    generated: Tensor,
    truth: Tensor,
    networks: PictureNetworks,
) -> None:
    """PSNR and perceptual distances of two batches of pictures [N, 3, Hp, Wp]."""
    scores.mean(f"{key}.psnr", metrics.psnr(generated, truth).numpy(), clips)
    for name, distance in networks.distances(generated, truth).items():
        scores.mean(f"{key}.{name}", distance.numpy(), clips)


def look_aways(pose: np.ndarray) -> list[tuple[int, int, float]]:
    """Stretches of recorded play in which the camera turned away and came back to the same view.

    pose [K, 5] -> [(frame left, frame returned, degrees away)], without overlaps. Empty where poses are
    unknown.
    """
    found, free = [], 0
    yaw = np.degrees(np.unwrap(np.radians(pose[:, 3]))) if np.isfinite(pose).all() else np.zeros(0)
    for i in range(len(yaw)):
        if i < free:
            continue
        after = slice(i, i + MAX_FRAMES + 1)
        away = np.abs(yaw[after] - yaw[i])
        back = away < SAME_ANGLE
        back &= np.abs(pose[after, 4] - pose[i, 4]) < SAME_ANGLE
        back &= np.linalg.norm(pose[after, :3] - pose[i, :3], axis=1) < SAME_PLACE
        farthest = np.maximum.accumulate(away)
        returned = np.flatnonzero(back & (farthest >= min(low for low, _ in ANGLE_RANGES.values())))
        if len(returned):
            j = int(returned[0])
            found.append((i, i + j, float(farthest[j])))
            free = i + j
    return found


def measure_look_aways(
    held_out: HeldOutClips, evaluated: EvaluatedModel, plan: Plan, networks: PictureNetworks, scores: Scores
) -> None:
    """`memory.recorded.degN.*`: the view that recorded play returned to, against the model's under the same
    actions; `copy.memory.recorded.degN.*`: against the recorded view left, since recorded codes do not return
    exactly either. `token_agreement`, `psnr`, `perceptual`; `segments`: how many there are."""
    given = plan.main_context
    found = [
        (clip, i, j, degrees)
        for clip, pose in enumerate(held_out.clips.pose)
        for i, j, degrees in look_aways(pose)
        if i >= given - 1
    ]
    for angle, (low, high) in ANGLE_RANGES.items():
        segments = np.array([(c, i, j) for c, i, j, degrees in found if low <= degrees < high])
        segments = thin(segments.reshape(-1, 3), plan.look_aways)
        if not len(segments):
            continue
        clips, left, lengths = segments[:, 0], segments[:, 1], segments[:, 2] - segments[:, 1]
        windows = np.stack([clips, left - given + 1], 1)
        context, before, pose = held_out.clips.batch(windows, given)
        actions = torch.zeros(len(segments), given - 1 + lengths.max(), 5)
        actions[:, : given - 1] = before
        truth = torch.empty_like(context[:, -1])
        for n, (clip, i, j) in enumerate(segments):
            tokens, recorded_actions, _ = held_out.clips.batch(np.array([(clip, i)]), j - i + 1)
            truth[n] = tokens[0, -1]
            actions[n, given - 1 : given - 1 + j - i] = recorded_actions[0]
        rollout = evaluated.rollout(context, actions, pose, f"recorded look-aways, {angle} degrees")
        returned = rollout[torch.arange(len(segments)), torch.from_numpy(lengths) - 1]
        key = f"memory.recorded.deg{angle}"
        for prefix, tokens in (("", returned), ("copy.", context[:, -1])):
            agreement = metrics.token_accuracy(tokens, truth).numpy()
            scores.mean(f"{prefix}{key}.token_agreement", agreement, clips)
            pictures = held_out.decode(tokens), held_out.decode(truth)
            report_pictures(scores, f"{prefix}{key}", clips, *pictures, networks)
        scores.add(f"{key}.segments", len(segments))
