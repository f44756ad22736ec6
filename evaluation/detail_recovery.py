"""Section recovery: how often play goes back because the picture has lost its detail (rollout/recovery.py).

From random held-out starts a player walks as in the section walk, with the recovery of play. Recorded clips
are watched by the same rule, from starts of their own: good pictures must not be interrupted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import metrics
from dataset.actions import horizontal_metres
from evaluation import walk
from evaluation.aggregate import Scores
from evaluation.evaluated_model import EvaluatedModel
from evaluation.held_out_clips import HeldOutClips
from evaluation.plan import Plan
from rollout.arguments import CONTEXT_FRAMES
from rollout.forward_walk import ForwardPlayer
from rollout.recovery import DetailWatch, Recovery
from runtime.video import to_float

RECORDED_EVERY = 3  # seconds between two starts in a recorded clip


@dataclass
class Interrupted:
    """The interruptions of one walk."""

    first: float = np.nan  # seconds to the first; NaN without any
    undone: list[float] = field(default_factory=list)  # seconds that each took back
    sharp: list[bool] = field(default_factory=list)  # whether the picture had kept the start's gradient
    after: list[float] = field(default_factory=list)  # detail over the second after each, see DetailWatch


def recorded_interruptions(tokens: Tensor, acts: np.ndarray, fps: float, seconds: int) -> np.ndarray:
    """Starts of a recorded clip, tokens [K, H, W] and `acts` [K-1], every RECORDED_EVERY seconds, watched for
    `seconds` or to the end of the clip -> rows of (seconds watched, interrupted 0 or 1)."""
    rows = []
    for start in range(CONTEXT_FRAMES, len(tokens) - round(fps), round(RECORDED_EVERY * fps)):
        watch, t = DetailWatch(tokens[start - CONTEXT_FRAMES : start], fps), start
        while t < min(len(tokens), start + seconds * fps) and not watch.lost:
            watch.add(tokens[t], bool(acts[t - 1]))
            t += 1
        rows.append(((t - start) / fps, float(watch.lost)))
    return np.array(rows).reshape(-1, 2)


@torch.inference_mode()
def play(
    evaluated: EvaluatedModel,
    context: tuple[Tensor, ...],
    player: walk.Player,
    frames: int,
    fps: float,
    seed: int,
) -> Interrupted:
    """Plays from a context of one world (see `Rollout.prime`), going back like play does."""
    rollout = evaluated.primed_rollout(seed, *context)
    recovery, found = Recovery(rollout, context[0][0], fps), Interrupted()
    gradient = float(metrics.spatial_gradient(to_float(rollout.pictures())))
    metres, since = np.full((1, frames), np.nan), None
    for t in range(frames):
        action = player(metres[:, :t])
        before = rollout.model.pose_of(rollout.state)
        rollout.step(torch.from_numpy(action))
        if before is not None:
            pose = torch.stack([before, rollout.model.pose_of(rollout.state)], 1).cpu().numpy()
            metres[:, t] = horizontal_metres(pose)[:, 0]
        lost = recovery.watch(bool(np.any(action)))
        since = None if since is None else since + 1
        if since == round(fps):
            found.after.append(recovery.watched.detail)
        if lost:
            sharpness = float(metrics.spatial_gradient(to_float(rollout.pictures()))) / gradient
            found.sharp.append(sharpness >= walk.DETAIL[0])
            found.first = (t + 1) / fps if np.isnan(found.first) else found.first
            found.undone.append(recovery.go_back()[0] / fps)
            since = 0
    return found


def measure(held_out: HeldOutClips, evaluated: EvaluatedModel, plan: Plan, scores: Scores) -> None:
    """`recovery.forward.*` and `recovery.mixed.*`, of walks from random starts.

    `interrupted`: share of the walks that go back at least once; `first_seconds`: median time to the first;
    `per_minute`; `back_seconds`: median time taken back; `sharp`: share of the interruptions in which the
    picture had kept the spatial gradient of the start, by the bounds of the section walk, so that they may be
    wrong; `after`: mean detail (different codes over those of the context) of the second after.
    `recording.recovery.mixed.interrupted`, `.per_minute`: the same rule on recorded clips.
    """
    fps, unit = held_out.manifest.fps, held_out.degrees_per_unit
    contexts = replace(plan, contexts=(CONTEXT_FRAMES,), walk_starts=plan.recovery_starts)
    starts = walk.choose_starts(held_out, contexts)
    frames = round(plan.recovery_seconds * fps)
    kinds: dict[str, Callable[[int], walk.Player]] = {
        "forward": lambda n: ForwardPlayer(1, round(fps), unit),
        "mixed": lambda n: walk.MixedPlayer([held_out.seed + n], frames, unit),
    }
    for kind, player_of in kinds.items() if len(starts) else ():
        found = []
        for n in tqdm(
            range(len(starts)), desc=f"{evaluated.name}: {kind}, recovery", unit="walk", leave=False
        ):
            context = held_out.clips.batch(starts[n : n + 1], CONTEXT_FRAMES)
            found.append(play(evaluated, context, player_of(n), frames, fps, n))
        key, clips = f"recovery.{kind}", starts[:, 0]
        count = np.array([len(walked.undone) for walked in found], float)
        of_each = np.repeat(clips, count.astype(int))
        scores.mean(f"{key}.interrupted", count > 0, clips)
        scores.mean(f"{key}.per_minute", count * 60 / plan.recovery_seconds, clips)
        scores.statistic(f"{key}.first_seconds", np.array([w.first for w in found]), clips, np.median)
        undone, sharp = (np.array([v for w in found for v in getattr(w, n)]) for n in ("undone", "sharp"))
        scores.statistic(f"{key}.back_seconds", undone, of_each, np.median)
        scores.mean(f"{key}.sharp", sharp, of_each)
        after = np.array([np.mean(w.after) if w.after else np.nan for w in found])
        scores.mean(f"{key}.after", after, clips)
    rows, clips = [], []
    for clip, tokens in enumerate(held_out.clips.tokens):
        acts = np.any(held_out.clips.actions[clip] != 0, 1)
        grids = torch.from_numpy(tokens.astype(np.int64))
        rows.append(recorded_interruptions(grids, acts, fps, plan.recovery_seconds))
        clips += [clip] * len(rows[-1])
    watched = np.concatenate(rows)
    scores.mean("recording.recovery.mixed.interrupted", watched[:, 1], np.array(clips))
    scores.mean("recording.recovery.mixed.per_minute", 60 * watched[:, 1], np.array(clips), watched[:, 0])
