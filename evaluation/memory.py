"""Section 5: the camera turns away and comes back. Is what it left still there?"""

import numpy as np
import torch
from torch import Tensor

import metrics
from evaluation.aggregate import Scores
from evaluation.controllability import places
from evaluation.held_out_clips import HeldOutClips, Judges, Plan, Subject, thin
from geometry import camera

ANGLES = (30, 60, 90, 180)  # degrees away
SPEED = 6.0  # degrees a frame
NEAREST = {30: (20, 45), 60: (45, 75), 90: (75, 135), 180: (135, 361)}  # recorded look-aways counted as each
LONGEST = 96  # frames of a recorded look-away
SAME_ANGLE, SAME_PLACE = 2.0, 0.25  # degrees and metres: the camera is back where it was


def measure(
    held: HeldOutClips, subject: Subject, plan: Plan, judges: Judges, scores: Scores
) -> dict[int, Tensor]:
    """`memory.degN.*` for each of ANGLES, of the view after turning away and back, against the one left:

    `token_agreement`, `psnr`, `perceptual`; `relative`: the agreement over that after as many frames without
    turning. `hidden_agreement` and `hidden_relative`: the same of those cells alone that were out of sight at
    the far end. `away_agreement`: of the view at the far end: a world that ignores the turn keeps it as high
    as at the return, and has then remembered nothing.

    -> generated tokens of each angle, [N, frames, H, W].
    """
    windows = thin(places(held, plan), plan.memory)
    seen, before = held.batch(windows, plan.main)
    left, known = seen[:, -1], held.pose(windows, plan.main)
    pose = torch.cat([torch.zeros(len(windows), 3), held.turned(windows, plan.main)[:, -1]], 1)
    side = torch.where(torch.arange(len(windows)) % 2 == 0, 1.0, -1.0)
    most = 2 * round(max(ANGLES) / SPEED)
    nothing = torch.zeros(len(windows), most, 5)
    stood = subject.rollout(seen, torch.cat([before, nothing], 1), known, "without turning")
    shown = {}
    for angle in ANGLES:
        away = round(angle / SPEED)
        turn = torch.zeros(len(windows), 2 * away, 5)
        turn[:, :away, 0] = side[:, None] * SPEED / held.degrees_per_unit
        turn[:, away:, 0] = -turn[:, :away, 0]
        made = subject.rollout(seen, torch.cat([before, turn], 1), known, f"{angle} degrees and back")
        shown[angle] = torch.cat([left[:, None], made], 1)
        far = pose.clone()
        far[:, 3] += side * angle
        _, in_sight = camera.reproject(far, pose, 0.0, *left.shape[-2:], held.fov)
        report(scores, f"memory.deg{angle}", windows[:, 0], left, made, stood[:, : 2 * away], ~in_sight)
        compare(
            scores, f"memory.deg{angle}.", windows[:, 0], held.decode(made[:, -1]), held.decode(left), judges
        )
    recorded(held, subject, plan, judges, scores)
    return shown


def report(
    scores: Scores, key: str, clips: np.ndarray, left: Tensor, made: Tensor, stood: Tensor, hidden: Tensor
) -> None:
    """Agreement of tokens: `left` [N, H, W], `made` and `stood` [N, K, H, W], `hidden` [N, H, W] bool."""
    same, kept = (made[:, -1] == left).float(), (stood[:, -1] == left).float()
    scores.mean(f"{key}.token_agreement", metrics.token_accuracy(made[:, -1], left).numpy(), clips)
    scores.mean(f"{key}.stood_agreement", metrics.token_accuracy(stood[:, -1], left).numpy(), clips)
    scores.ratio(f"{key}.relative", f"{key}.token_agreement", f"{key}.stood_agreement")
    away = made[:, made.shape[1] // 2 - 1]
    scores.mean(f"{key}.away_agreement", metrics.token_accuracy(away, left).numpy(), clips)
    cells = hidden.sum((1, 2)).numpy()
    scores.mean(f"{key}.hidden_agreement", (same * hidden).sum((1, 2)).numpy(), clips, cells)
    scores.mean(f"{key}.hidden_stood_agreement", (kept * hidden).sum((1, 2)).numpy(), clips, cells)
    scores.ratio(f"{key}.hidden_relative", f"{key}.hidden_agreement", f"{key}.hidden_stood_agreement")


def compare(
    scores: Scores, prefix: str, clips: np.ndarray, made: Tensor, truth: Tensor, judges: Judges
) -> None:
    """PSNR and perceptual distances of two batches of pictures [N, 3, Hp, Wp]."""
    scores.mean(f"{prefix}psnr", metrics.psnr(made, truth).numpy(), clips)
    for name, distance in judges.distances(made, truth).items():
        scores.mean(f"{prefix}{name}", distance.numpy(), clips)


def look_aways(pose: np.ndarray) -> list[tuple[int, int, float]]:
    """Stretches of recorded play in which the camera turned away and came back to the same view.

    pose [K, 5] -> [(frame left, frame returned, degrees away)], none overlapping another. Nothing where the
    pose is not known.
    """
    found, free = [], 0
    yaw = np.degrees(np.unwrap(np.radians(pose[:, 3]))) if np.isfinite(pose).all() else np.zeros(0)
    for i in range(len(yaw)):
        if i < free:
            continue
        after = slice(i, i + LONGEST + 1)
        away = np.abs(yaw[after] - yaw[i])
        back = away < SAME_ANGLE
        back &= np.abs(pose[after, 4] - pose[i, 4]) < SAME_ANGLE
        back &= np.linalg.norm(pose[after, :3] - pose[i, :3], axis=1) < SAME_PLACE
        far = np.maximum.accumulate(away)
        returned = np.flatnonzero(back & (far >= min(low for low, _ in NEAREST.values())))
        if len(returned):
            j = int(returned[0])
            found.append((i, i + j, float(far[j])))
            free = i + j
    return found


def recorded(held: HeldOutClips, subject: Subject, plan: Plan, judges: Judges, scores: Scores) -> None:
    """`memory.recorded.degN.*`: the view that real play came back to, against the world's under the same
    actions (`token_agreement`, `psnr`, `perceptual`) and against the view that was left
    (`copy_token_agreement`, …): the truth itself does not come back to the very same codes."""
    every = [
        (clip, i, j, degrees)
        for clip, pose in enumerate(held.clips.pose)
        for i, j, degrees in look_aways(pose)
        if i >= plan.main - 1
    ]
    for angle, (low, high) in NEAREST.items():
        chosen = thin(
            np.array([(c, i, j) for c, i, j, d in every if low <= d < high]).reshape(-1, 3), plan.recorded
        )
        if not len(chosen):
            continue
        clips, length = chosen[:, 0], chosen[:, 2] - chosen[:, 1]
        tokens, actions = [], torch.zeros(len(chosen), plan.main - 1 + length.max(), 5)
        for n, (clip, i, j) in enumerate(chosen):
            seen, done = held.clips.window(clip, i - plan.main + 1, plan.main + j - i)
            tokens.append(torch.from_numpy(seen[[*range(plan.main), -1]].astype(np.int64)))
            actions[n, : len(done)] = torch.from_numpy(done)
        tokens = torch.stack(tokens)
        seen, truth = tokens[:, :-1], tokens[:, -1]
        pose = held.pose(np.stack([clips, chosen[:, 1] - plan.main + 1], 1), plan.main)
        generated = subject.rollout(seen, actions, pose, f"recorded, about {angle} degrees")
        made = generated[torch.arange(len(chosen)), torch.from_numpy(length) - 1]
        key, painted = f"memory.recorded.deg{angle}", held.decode(truth)
        for prefix, prediction in ((f"{key}.", made), (f"{key}.copy_", seen[:, -1])):
            agreement = metrics.token_accuracy(prediction, truth).numpy()
            scores.mean(f"{prefix}token_agreement", agreement, clips)
            compare(scores, prefix, clips, held.decode(prediction), painted, judges)
        scores.add(f"{key}.segments", len(chosen))
