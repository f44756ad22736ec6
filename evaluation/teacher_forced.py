"""Section 1: the world is shown every true frame and predicts the next one's tokens."""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataset.actions import CLASS_NAMES, action_class
from evaluation.aggregate import Scores
from evaluation.held_out_clips import BATCH, HeldOutClips, Plan, Subject
from geometry import camera
from metrics import bits_per_token
from runtime.device import autocast

# What the player does in a frame, coarser than actions.CLASS_NAMES.
CLASSES = {
    "still": ("still",),
    "turn": ("turn", "look"),
    "move": ("walk", "strafe", "jump"),
    "both": ("walk+turn",),
}


def stretches(lengths: list[int], frames: int) -> list[tuple[int, int, int]]:
    """One stretch of each clip, (clip, start, transitions), with `frames` transitions in all at most.

    Each clip gives the same share, from its middle; what short clips do not use goes to the others.
    """
    left, chosen = frames, []
    order = sorted(range(len(lengths)), key=lambda clip: lengths[clip])
    for i, clip in enumerate(order):
        whole = lengths[clip] - 1
        count = min(whole, left // (len(order) - i))
        left -= count
        if count:
            chosen.append((clip, (whole - count) // 2, count))
    return sorted(chosen)


@torch.inference_mode()
def predict(
    held: HeldOutClips, subject: Subject, chosen: list[tuple[int, int, int]]
) -> dict[str, np.ndarray]:
    """One pass over the stretches; the state runs on along each.

    -> of each predicted frame: `clip`, `kind` (number in CLASSES), `nats` (summed cross entropy), `right` and
    `copied` (cells predicted by the model, and by repeating the frame before), `tokens` (cells in all), `new`
    (cells that come into view, where poses are known) and `new_right` (those of them predicted).
    """
    model, device = subject.model, held.device
    fine = {name: i for i, names in enumerate(CLASSES.values()) for name in names}
    kind_of = np.array([fine[name] for name in CLASS_NAMES])
    rows = {name: [] for name in ("clip", "kind", "nats", "right", "copied", "tokens", "new", "new_right")}
    # Longest first: those that have ended are then always at the end of the batch, and are dropped from it.
    order = sorted(chosen, key=lambda stretch: -stretch[2])
    total = sum(count for _, _, count in chosen)
    with tqdm(total=total, desc=f"{subject.name}: teacher-forced", unit="frame", leave=False) as bar:
        for part in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
            windows = [held.clips.window(clip, start, count + 1) for clip, start, count in part]
            grids = [torch.from_numpy(tokens.astype(np.int64)).to(device) for tokens, _ in windows]
            kinds = [kind_of[action_class(actions)] for _, actions in windows]
            poses = [held.pose(np.array([(c, s)]), count + 1)[0] for c, s, count in part]
            vectors = [torch.from_numpy(actions).to(device) for _, actions in windows]
            state = model.init_state(len(part), device)
            for t in range(part[0][2]):
                n = sum(t < count for _, _, count in part)
                now = torch.stack([g[t] for g in grids[:n]])  # [n, H, W]
                following = torch.stack([g[t + 1] for g in grids[:n]])
                action = torch.stack([v[t] for v in vectors[:n]])  # [n, A]
                pose = torch.stack([p[t : t + 2] for p in poses[:n]]).to(device)
                with autocast(device, subject.dtype):
                    state = model.select_worlds(state, slice(n))
                    prediction, state = model.predict(now, action, state, true_pose=pose[:, 0])
                    logits = model.logits(prediction)
                logits = logits.float()
                rows["clip"] += [clip for clip, _, _ in part[:n]]
                rows["kind"] += [k[t] for k in kinds[:n]]
                rows["nats"] += F.cross_entropy(logits, following, reduction="none").sum((1, 2)).tolist()
                right = logits.argmax(1) == following
                rows["right"] += right.sum((1, 2)).tolist()
                new = camera.disoccluded_mask(pose[:, 0], pose[:, 1], *now.shape[1:], held.fov)
                rows["new"] += new.sum((1, 2)).tolist()
                rows["new_right"] += (right & new).sum((1, 2)).tolist()
                rows["copied"] += (now == following).sum((1, 2)).tolist()
                rows["tokens"] += [now[0].numel()] * n
                bar.update(n)
    return {name: np.array(values) for name, values in rows.items()}


def measure(held: HeldOutClips, subject: Subject, plan: Plan, scores: Scores) -> None:
    """`tf.bits_per_token`, `tf.accuracy`, `copy.tf.accuracy`, and the same for each of CLASSES;
    `tf.disoccluded_accuracy`: of the cells that come into view alone, where poses are known."""
    rows = predict(held, subject, stretches(held.lengths, plan.teacher_forced))
    bits = bits_per_token(1.0, 1)  # of one nat
    everything = np.ones(len(rows["clip"]), bool)
    groups = {"tf": everything} | {f"tf.{name}": rows["kind"] == i for i, name in enumerate(CLASSES)}
    for prefix, chosen in groups.items():
        clips, tokens = rows["clip"][chosen], rows["tokens"][chosen]
        scores.mean(f"{prefix}.bits_per_token", rows["nats"][chosen] * bits, clips, tokens)
        scores.mean(f"{prefix}.accuracy", rows["right"][chosen], clips, tokens)
        scores.mean(f"copy.{prefix}.accuracy", rows["copied"][chosen], clips, tokens)
        scores.add(f"{prefix}.frames", chosen.sum())
    if rows["new"].any():
        scores.mean("tf.disoccluded_accuracy", rows["new_right"], rows["clip"], rows["new"])
