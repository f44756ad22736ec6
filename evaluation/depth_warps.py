"""Section depth: recorded frames warped by their depth to later recorded poses, against the later frames.

Nothing is learnt or filled in but the depth, so the PSNR measures the depth alone (depth/warp_quality.py). It
does not depend on the world model.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from depth.predictor import DepthPredictor
from depth.warp_quality import (
    COPY,
    DECODED,
    GROUND,
    HORIZONS,
    PREDICTED,
    RECORDED,
    ROTATION,
    VISIBLE,
    gain_share,
    source_depths,
    warp_psnr,
)
from evaluation.aggregate import Scores
from evaluation.held_out_clips import HeldOutClips, has_recorded_depth, spread_windows
from evaluation.plan import BATCH, Plan

# Key of each kind of warp: the depth that the world model can have stands in its column.
KEYS = {
    COPY: "copy.depth.h{}.psnr",
    ROTATION: "rot.depth.h{}.psnr",
    GROUND: "geo.depth.h{}.psnr",
    RECORDED: "recording.depth.h{}.psnr",
    VISIBLE: "recording.depth.h{}.visible",
    PREDICTED: "depth.h{}.psnr",
    DECODED: "depth.h{}.psnr_decoded",
}
GAIN_SHARES = {PREDICTED: "depth.h{}.gain_share", DECODED: "depth.h{}.gain_share_decoded"}


@dataclass(frozen=True)
class DepthWarps:
    """PSNR of warped frames, and the share of the view that the source shows, for each window."""

    clips: np.ndarray  # [N] of each window
    values: dict[str, np.ndarray]  # kind of warp -> [N, horizons]


def usable_clips(held_out: HeldOutClips) -> np.ndarray:
    """Which clips are measured [C] bool: of those with poses the ones with recorded depth, if there are any.

    So all rows are means over the same windows.
    """
    posed = np.array([np.isfinite(pose).all() for pose in held_out.clips.pose])
    recorded = posed & [has_recorded_depth(held_out, clip) for clip in range(len(posed))]
    return recorded if recorded.any() else posed


@torch.inference_mode()
def read(held_out: HeldOutClips, plan: Plan, predictor: DepthPredictor) -> DepthWarps | None:
    """Warps `plan.depth_windows` windows; None, with a message, where poses or videos are missing.

    The token files' depth must be loaded (`TokenClips`, extras "depth"); without recorded depth its rows are
    left out, and so are those of predicted depth if the network takes pictures of another size.
    """
    usable = usable_clips(held_out)
    lengths = [n if use else 0 for n, use in zip(held_out.lengths, usable, strict=True)]
    span = max(HORIZONS) + 1
    if max(lengths) < span:
        tqdm.write(f"section depth: no clip of {span} frames has poses; left out")
        return None
    windows = spread_windows(lengths, span, plan.depth_windows, held_out.seed)
    offsets = np.array([0, *HORIZONS])
    pictures = held_out.original_pictures(windows, offsets)
    windows = windows[list(pictures)]
    if not len(windows):
        tqdm.write("section depth: no video can be opened; left out")
        return None
    config = predictor.config
    fits = [config.height, config.width] == held_out.manifest.picture_size
    if not fits:
        tqdm.write(f"section depth: {predictor.path} takes {config.width}x{config.height}; left out")
    depth = held_out.clips.extras.get("depth")
    recorded = has_recorded_depth(held_out, windows[0, 0])
    shown = list(pictures.values())
    values: dict[str, list[np.ndarray]] = {}
    for first in tqdm(range(0, len(windows), BATCH), desc="depth", unit="batch", leave=False):
        part = windows[first : first + BATCH]
        codes = np.stack([depth[clip][start] for clip, start in part]) if recorded else None
        batch = torch.stack(shown[first : first + BATCH])
        pose = torch.from_numpy(np.stack([held_out.clips.pose[c][s + offsets] for c, s in part]))
        depths = source_depths(
            batch[:, 0], pose[:, 0, 4], codes, predictor if fits else None, held_out.tokenizer
        )
        for kind, found in warp_psnr(batch, pose, depths, held_out.fov).items():
            values.setdefault(kind, []).append(found.numpy())
    return DepthWarps(windows[:, 0], {kind: np.concatenate(found) for kind, found in values.items()})


def report(warps: DepthWarps | None, scores: Scores) -> None:
    """`depth.hH.psnr`: PSNR of frames warped by the predicted depth, at each horizon H; `psnr_decoded`: by
    the depth predicted from the frame as the tokenizer reconstructs it (the recorded frame is warped);
    `gain_share`, `gain_share_decoded`: their gain over the flat ground, in shares of the recorded depth's.

    `copy.depth.hH.psnr`, `rot.*`, `geo.*`: without depth. `recording.depth.hH.psnr`: by the recorded depth;
    `recording.depth.hH.visible`: share of the view that the source shows, by the recorded depth.
    """
    if warps is None:
        return
    for kind, values in warps.values.items():
        for i, horizon in enumerate(HORIZONS):
            scores.mean(KEYS[kind].format(horizon), values[:, i], warps.clips)
    for kind, key in GAIN_SHARES.items():
        if kind in warps.values and RECORDED in warps.values:
            compared = np.stack([warps.values[name] for name in (kind, GROUND, RECORDED)], -1)
            for i, horizon in enumerate(HORIZONS):
                scores.statistic(
                    key.format(horizon), compared[:, i], warps.clips, lambda rows: gain_share(*rows.mean(0))
                )
    scores.add("depth.windows", len(warps.clips))
