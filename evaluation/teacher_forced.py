"""Section teacher_forced: the model is given every true frame and predicts the tokens of the next one."""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataset.actions import CLASS_NAMES, action_class
from evaluation.aggregate import Scores
from evaluation.evaluated_model import EvaluatedModel
from evaluation.held_out_clips import HeldOutClips
from evaluation.plan import BATCH, Plan
from geometry import camera
from metrics import bits_per_token
from runtime.device import autocast

# What the player does between two frames: groups of the action classes CLASS_NAMES.
ACTION_GROUPS = {
    "still": ("still",),
    "turn": ("turn", "look"),
    "move": ("walk", "strafe", "jump"),
    "both": ("walk+turn",),
}
COLUMNS = (
    "clip", "group", "nats", "correct", "copy_correct", "tokens", "disoccluded", "disoccluded_correct",
)  # fmt: skip


def stretches(lengths: list[int], frames: int) -> list[tuple[int, int, int]]:
    """One stretch per clip: (clip, start, transitions), with at most `frames` transitions in total.

    Each clip contributes the same number from its middle; what short clips lack is given to longer ones.
    """
    left, selected = frames, []
    order = sorted(range(len(lengths)), key=lambda clip: lengths[clip])
    for i, clip in enumerate(order):
        transitions = lengths[clip] - 1
        count = min(transitions, left // (len(order) - i))
        left -= count
        if count:
            selected.append((clip, (transitions - count) // 2, count))
    return sorted(selected)


@torch.inference_mode()
def predict(
    held_out: HeldOutClips, evaluated: EvaluatedModel, selected: list[tuple[int, int, int]]
) -> dict[str, np.ndarray]:
    """One pass over the stretches; the model's state continues along each.

    Returns an array per name in COLUMNS with one value per predicted frame: `clip`, `group` (index in
    ACTION_GROUPS), `nats` (summed cross-entropy), and numbers of cells: `correct` (predicted by the model),
    `copy_correct` (predicted by repeating the frame before), `tokens` (all cells), `disoccluded` (by the
    camera's motion over a flat ground, 0 where poses are unknown), `disoccluded_correct`.
    """
    model, device = evaluated.model, held_out.tokenizer.device
    group_of_class = {name: i for i, names in enumerate(ACTION_GROUPS.values()) for name in names}
    group_of = np.array([group_of_class[name] for name in CLASS_NAMES])
    rows: dict[str, list] = {name: [] for name in COLUMNS}
    # Longest first: those that have ended are then always at the end of the batch, and are dropped from it.
    order = sorted(selected, key=lambda stretch: -stretch[2])
    total = sum(count for _, _, count in selected)
    with tqdm(total=total, desc=f"{evaluated.name}: teacher-forced", unit="frame", leave=False) as bar:
        for part in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
            batches = [
                held_out.clips.batch(np.array([(clip, start)]), count + 1) for clip, start, count in part
            ]
            tokens, actions, poses = (
                [x[0].to(device) for x in field] for field in zip(*batches, strict=True)
            )
            groups = [group_of[action_class(a[0].numpy())] for _, a, _ in batches]
            state = model.init_state(len(part), device)
            for t in range(part[0][2]):
                n = sum(t < count for _, _, count in part)
                current = torch.stack([g[t] for g in tokens[:n]])  # [n, H, W]
                following = torch.stack([g[t + 1] for g in tokens[:n]])
                action = torch.stack([a[t] for a in actions[:n]])  # [n, A]
                pose = torch.stack([p[t : t + 2] for p in poses[:n]])  # [n, 2, 5]
                with autocast(device, evaluated.dtype):
                    state = model.select_worlds(state, slice(n))
                    prediction, state = model.predict(current, action, state, true_pose=pose[:, 0])
                    logits = model.logits(prediction)
                logits = logits.float()
                correct = logits.argmax(1) == following
                disoccluded = camera.disoccluded_mask(
                    pose[:, 0], pose[:, 1], *current.shape[1:], held_out.fov
                )
                rows["clip"] += [clip for clip, _, _ in part[:n]]
                rows["group"] += [g[t] for g in groups[:n]]
                rows["nats"] += F.cross_entropy(logits, following, reduction="none").sum((1, 2)).tolist()
                rows["correct"] += correct.sum((1, 2)).tolist()
                rows["copy_correct"] += (current == following).sum((1, 2)).tolist()
                rows["tokens"] += [current[0].numel()] * n
                rows["disoccluded"] += disoccluded.sum((1, 2)).tolist()
                rows["disoccluded_correct"] += (correct & disoccluded).sum((1, 2)).tolist()
                bar.update(n)
    return {name: np.array(values) for name, values in rows.items()}


def measure(held_out: HeldOutClips, evaluated: EvaluatedModel, plan: Plan, scores: Scores) -> None:
    """`tf.bits_per_token`, `tf.accuracy`, `copy.tf.accuracy` and `tf.frames`, and the same for each of
    ACTION_GROUPS (`tf.turn.accuracy`, ...); `tf.disoccluded_accuracy`: of disoccluded cells only, where poses
    are known."""
    rows = predict(held_out, evaluated, stretches(held_out.lengths, plan.teacher_forced_frames))
    bits = bits_per_token(1.0, 1)  # in one nat
    groups = {"tf": np.ones(len(rows["clip"]), bool)}
    groups |= {f"tf.{name}": rows["group"] == i for i, name in enumerate(ACTION_GROUPS)}
    for prefix, group in groups.items():
        clips, tokens = rows["clip"][group], rows["tokens"][group]
        scores.mean(f"{prefix}.bits_per_token", rows["nats"][group] * bits, clips, tokens)
        scores.mean(f"{prefix}.accuracy", rows["correct"][group], clips, tokens)
        scores.mean(f"copy.{prefix}.accuracy", rows["copy_correct"][group], clips, tokens)
        scores.add(f"{prefix}.frames", group.sum())
    if rows["disoccluded"].any():
        scores.mean("tf.disoccluded_accuracy", rows["disoccluded_correct"], rows["clip"], rows["disoccluded"])
