"""Section 6: very long rollouts. Does the world stay one?"""

import numpy as np
import torch
from torch import Tensor

import metrics
from evaluation.aggregate import Scores
from evaluation.held_out_clips import PICTURES, HeldOutClips, Judges, Plan, Subject, thin

WINDOW = 64  # frames over which a long rollout is judged
EVERY = 2  # of them, every so many-th is looked at as a picture


def streams(held: HeldOutClips, plan: Plan) -> tuple[np.ndarray, Tensor, Tensor]:
    """-> clips [N], the first `plan.main` frames of each [N, main, H, W], and actions [N, main-1+life, 5].

    Of clips that are long enough, evenly spaced; if none is, of the longest, their actions over and over.
    """
    needed = plan.main + plan.life
    long = [c for c, frames in enumerate(held.lengths) if frames >= needed]
    if not long:
        long = sorted(np.argsort(held.lengths, kind="stable")[-plan.streams :].tolist())
    clips = thin(np.array(long), plan.streams)
    seen = np.stack([held.clips.tokens[c][: plan.main] for c in clips]).astype(np.int64)
    actions = np.stack([np.resize(held.clips.actions[c], (needed - 1, 5)) for c in clips])
    return clips, torch.from_numpy(seen), torch.from_numpy(actions)


def histogram(tokens: Tensor, codes: int) -> Tensor:
    """How often each code occurs in any grid of tokens: [V]."""
    return torch.bincount(tokens.flatten(), minlength=codes)


@torch.inference_mode()
def embed(held: HeldOutClips, judges: Judges, tokens: Tensor) -> Tensor:
    """Features of decoded frames: tokens [N, T, H, W] -> [N * T / EVERY, D]."""
    grids = tokens[:, ::EVERY].flatten(0, 1)
    device = next(judges.embed.parameters()).device
    return torch.cat([judges.embed.embedding(held.decode(g).to(device)).cpu() for g in grids.split(PICTURES)])


def measure(
    held: HeldOutClips, subject: Subject, plan: Plan, judges: Judges, scores: Scores
) -> tuple[dict[str, list[float]], Tensor]:
    """`life.*`; -> series over windows of WINDOW frames for the plots, and the generated tokens [N, life, H, W].

    `fd`: Frechet distance of a window of all streams to the recordings of the same clips, whole; `fd_first`,
    `fd_last`, `fd_ratio` = last over first, `fd_truth` = the mean of the recordings' own windows, which is
    what so few pictures come to when nothing is wrong. `codes_ratio`: different codes in a frame of the last
    window over the recordings'. `divergence_last`: Jensen-Shannon divergence of its codes, in bits.
    `collapse_frame`: by metrics.collapse_frame, where change is the share of cells whose code changed.
    """
    clips, seen, actions = streams(held, plan)
    codes = held.manifest.codebook_size
    pose = held.pose(np.stack([clips, np.zeros_like(clips)], 1), plan.main)
    generated = subject.rollout(seen, actions, pose, f"{plan.life} frames")
    recordings = [
        torch.from_numpy(held.clips.tokens[c][: plan.main + plan.life].astype(np.int64)) for c in clips
    ]
    truth = {
        "codes": float(torch.cat([metrics.unique_codes(r) for r in recordings]).float().mean()),
        "change": float(torch.cat([metrics.flip_rate(r[1:], r[:-1]) for r in recordings]).mean()),
        "histogram": sum(histogram(r, codes) for r in recordings),
    }
    features = [embed(held, judges, r[None]) for r in recordings]
    reference = torch.cat(features)
    with_start = torch.cat([seen[:, -1:], generated], 1)
    series: dict[str, list[float]] = {
        name: [] for name in ("fd", "fd_truth", "divergence", "codes", "change")
    }
    for first in range(0, plan.life - WINDOW + 1, WINDOW):
        now = generated[:, first : first + WINDOW]
        series["fd"].append(metrics.frechet_distance(embed(held, judges, now), reference))
        same = [f[first // EVERY : (first + WINDOW) // EVERY] for f in features]
        if all(len(f) == WINDOW // EVERY for f in same):
            series["fd_truth"].append(metrics.frechet_distance(torch.cat(same), reference))
        series["divergence"].append(metrics.jensen_shannon(histogram(now, codes), truth["histogram"]))
        series["codes"].append(float(metrics.unique_codes(now).float().mean()))
        change = metrics.flip_rate(now, with_start[:, first : first + WINDOW])
        series["change"].append(float(change.mean()))
    over = {name: np.array(series[name]) / truth[name] for name in ("codes", "change")}
    frame = metrics.collapse_frame(over["codes"], np.array(series["divergence"]), over["change"], WINDOW)
    scores.add("life.collapse_frame", frame)
    scores.add("life.fd_first", series["fd"][0])
    scores.add("life.fd_last", series["fd"][-1])
    scores.ratio("life.fd_ratio", "life.fd_last", "life.fd_first")
    if series["fd_truth"]:
        scores.add("life.fd_truth", float(np.mean(series["fd_truth"])))
    scores.add("life.divergence_last", series["divergence"][-1])
    last = metrics.unique_codes(generated[:, -WINDOW:]).float().mean(1) / truth["codes"]
    scores.mean("life.codes_ratio", last.numpy(), clips)
    scores.add("life.change_ratio", over["change"][-1])
    series["truth_codes"], series["truth_change"] = [truth["codes"]], [truth["change"]]
    return series, generated
