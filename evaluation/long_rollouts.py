"""Section long: very long rollouts. Do they stay as varied and as changing as the recordings?"""

import numpy as np
import torch
from torch import Tensor

import metrics
from evaluation.aggregate import Scores
from evaluation.evaluated_model import EvaluatedModel
from evaluation.held_out_clips import HeldOutClips, thin
from evaluation.picture_networks import PictureNetworks
from evaluation.plan import Plan

WINDOW = 64  # frames of a long rollout that are measured together
EVERY = 2  # every second frame is decoded and embedded


def long_contexts(held_out: HeldOutClips, plan: Plan) -> tuple[np.ndarray, Tensor]:
    """The clips [N] that long rollouts start in, and the actions [N, main_context-1+long_frames, 5].

    Clips that are long enough, evenly spaced; if there are none, the longest ones, their actions repeated.
    """
    needed = plan.main_context + plan.long_frames
    usable = [clip for clip, frames in enumerate(held_out.lengths) if frames >= needed]
    if not usable:
        by_length = np.argsort(held_out.lengths, kind="stable")
        usable = sorted(by_length[-plan.long_rollouts :].tolist())
    clips = thin(np.array(usable), plan.long_rollouts)
    actions = np.stack([np.resize(held_out.clips.actions[clip], (needed - 1, 5)) for clip in clips])
    return clips, torch.from_numpy(actions)


def histogram(tokens: Tensor, codes: int) -> Tensor:
    """How often each code occurs in any grids of tokens: [V]."""
    return torch.bincount(tokens.flatten(), minlength=codes)


@torch.inference_mode()
def embed(held_out: HeldOutClips, networks: PictureNetworks, tokens: Tensor) -> Tensor:
    """Features of every EVERY-th decoded frame: tokens [N, T, H, W] -> [N * T / EVERY, D]."""
    grids = tokens[:, ::EVERY].flatten(0, 1)
    batches = held_out.tokenizer.decode_frames(grids, held_out.dtype)
    return torch.cat([networks.embeddings(pictures) for pictures in batches])


def measure(
    held_out: HeldOutClips, evaluated: EvaluatedModel, plan: Plan, networks: PictureNetworks, scores: Scores
) -> tuple[dict[str, list[float]], Tensor]:
    """`long.*`. Returns the series over windows of WINDOW frames, and the generated tokens [N, K, H, W].

    `fd_first`, `fd_last`: Fréchet distance of the first and last window of all rollouts to the recordings of
    the same clips; `fd_ratio`: last over first; `recording.long.fd`: mean over the recordings' own windows,
    the bias of so few pictures. `codes_ratio`: different codes in a frame of the last window over the
    recordings'. `divergence_last`: Jensen-Shannon divergence of its codes, in bits. `change_ratio`: share of
    cells whose code changes, over the recordings'. `collapse_frame`: by `metrics.collapse_frame`.
    """
    clips, actions = long_contexts(held_out, plan)
    codes = held_out.manifest.codebook_size
    context, _, pose = held_out.clips.batch(np.stack([clips, np.zeros_like(clips)], 1), plan.main_context)
    generated = evaluated.rollout(context, actions, pose, f"{plan.long_frames} frames")
    length = plan.main_context + plan.long_frames
    recordings = [torch.from_numpy(held_out.clips.tokens[c][:length].astype(np.int64)) for c in clips]
    truth = {
        "codes": float(torch.cat([metrics.unique_codes(r) for r in recordings]).float().mean()),
        "change": float(torch.cat([metrics.flip_rate(r[1:], r[:-1]) for r in recordings]).mean()),
    }
    true_histogram = sum(histogram(r, codes) for r in recordings)
    true_features = [embed(held_out, networks, r[None]) for r in recordings]
    reference = torch.cat(true_features)
    with_last = torch.cat([context[:, -1:], generated], 1)
    series: dict[str, list[float]] = {
        name: [] for name in ("fd", "fd_recording", "divergence", "codes", "change")
    }
    for first in range(0, plan.long_frames - WINDOW + 1, WINDOW):
        window = generated[:, first : first + WINDOW]
        series["fd"].append(metrics.frechet_distance(embed(held_out, networks, window), reference))
        recorded = [f[first // EVERY : (first + WINDOW) // EVERY] for f in true_features]
        if all(len(f) == WINDOW // EVERY for f in recorded):
            series["fd_recording"].append(metrics.frechet_distance(torch.cat(recorded), reference))
        series["divergence"].append(metrics.jensen_shannon(histogram(window, codes), true_histogram))
        series["codes"].append(float(metrics.unique_codes(window).float().mean()))
        change = metrics.flip_rate(window, with_last[:, first : first + WINDOW])
        series["change"].append(float(change.mean()))
    ratios = {name: np.array(series[name]) / truth[name] for name in ("codes", "change")}
    collapse = metrics.collapse_frame(
        ratios["codes"], np.array(series["divergence"]), ratios["change"], WINDOW
    )
    scores.add("long.collapse_frame", collapse)
    scores.add("long.fd_first", series["fd"][0])
    scores.add("long.fd_last", series["fd"][-1])
    scores.ratio("long.fd_ratio", "long.fd_last", "long.fd_first")
    if series["fd_recording"]:
        scores.add("recording.long.fd", float(np.mean(series["fd_recording"])))
    scores.add("long.divergence_last", series["divergence"][-1])
    last = metrics.unique_codes(generated[:, -WINDOW:]).float().mean(1) / truth["codes"]
    scores.mean("long.codes_ratio", last.numpy(), clips)
    scores.add("long.change_ratio", ratios["change"][-1])
    series["codes_recording"], series["change_recording"] = [truth["codes"]], [truth["change"]]
    return series, generated
