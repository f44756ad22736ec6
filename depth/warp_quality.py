"""The quality of a depth: how well a frame, warped by its depth, shows a later frame.

A recorded frame is warped to the recorded pose of a later one, by several depths of the source frame, and
compared with the later frame. Nothing else is learnt or filled in, so the PSNR measures the depth alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.surroundings import FARTHEST, decode_inverse_ray_distance
from dataset.token_files import DataError
from depth.depth_clips import DepthClip
from depth.predictor import DepthPredictor
from geometry import camera
from geometry.zbuffer import warp_by_zbuffer
from metrics import psnr
from runtime.video import to_float
from vq_vae.tokenizer import Tokenizer

HORIZONS = (1, 4, 8, 16, 20)  # frames ahead
FIRST, EVERY = 6, 37  # source frames of a clip: the first, and every so many
COPY, ROTATION, GROUND = "copy", "rotation", "flat ground"
RECORDED, PREDICTED, DECODED = "recorded depth", "predicted depth", "predicted depth of decoded pictures"
VISIBLE = "share of the view that the source shows"


@dataclass(frozen=True)
class WarpQuality:
    """PSNR in dB of each kind of warp, and the share that is visible by the recorded depth, by horizon."""

    rows: dict[str, dict[int, float]]  # means over windows
    windows: int

    def gain_share(self, kind: str, horizon: int) -> float:
        """`gain_share` of the means at a horizon."""
        return gain_share(*(self.rows[row][horizon] for row in (kind, GROUND, RECORDED)))

    def table(self) -> str:
        """The rows as text."""
        horizons = list(self.rows[COPY])
        lines = [
            f"{f'PSNR (dB), {self.windows} windows; frames ahead':45s}" + "".join(f"{h:7d}" for h in horizons)
        ]
        for kind, values in self.rows.items():
            lines.append(f"{kind:45s}" + "".join(f"{values[h]:7.2f}" for h in horizons))
        for kind in (PREDICTED, DECODED):
            if kind in self.rows and RECORDED in self.rows:
                shares = "".join(f"{self.gain_share(kind, h):7.2f}" for h in horizons)
                lines.append(f"{f'{kind}: share of gain':45s}{shares}")
        return "\n".join(lines)


def gain_share(found: float, ground: float, recorded: float) -> float:
    """The gain in dB of a kind of warp over the flat ground, in shares of that of the recorded depth."""
    return (found - ground) / (recorded - ground)


def warp_quality(
    clips: Iterable[DepthClip],
    fov: float,
    predictor: DepthPredictor | None = None,
    tokenizer: Tokenizer | None = None,
    horizons: Sequence[int] = HORIZONS,
    every: int = EVERY,
) -> WarpQuality:
    """Warps frames of whole clips (step 1) by their recorded depth and by the predicted one.

    The recorded depth is left out unless all clips have it. With `tokenizer` the depth is also predicted from
    the encoded and decoded frame; the frame that is warped is always the recorded one. `fov` is the vertical
    field of view in degrees. Windows without poses are left out. Raises DataError if none is left.
    """
    values: dict[str, list[Tensor]] = {}  # kind -> [n, F] of each clip
    for clip in clips:
        starts = torch.tensor(range(FIRST, len(clip.pictures) - max(horizons), every), dtype=torch.long)
        pose = torch.from_numpy(clip.pose)
        known = pose.isfinite().all(1)
        starts = starts[known[starts[:, None] + torch.tensor([0, *horizons])].all(1)]
        if not len(starts):
            continue
        at = starts[:, None] + torch.tensor([0, *horizons])
        pictures = to_float(torch.from_numpy(clip.pictures[at.flatten()])).unflatten(0, at.shape)
        pose = pose[at]
        codes = None if clip.codes is None else clip.codes[starts]
        depths = source_depths(pictures[:, 0], pose[:, 0, 4], codes, predictor, tokenizer)
        for kind, found in warp_psnr(pictures, pose, depths, fov).items():
            values.setdefault(kind, []).append(found)
    if not values:
        raise DataError(
            f"none of the clips has {FIRST + max(horizons) + 1} frames with poses; give longer clips, "
            "or clips with poses"
        )
    windows = sum(map(len, values[COPY]))
    means = {
        kind: dict(zip(horizons, torch.cat(found).mean(0).tolist(), strict=True))
        for kind, found in values.items()
        if sum(map(len, found)) == windows
    }
    return WarpQuality(means, windows)


def source_depths(
    source: Tensor,
    pitch: Tensor,
    codes: np.ndarray | None,
    predictor: DepthPredictor | None,
    tokenizer: Tokenizer | None,
) -> dict[str, Tensor]:
    """The depths of frames by kind, inverse ray distances [N, H, W] in 1/m.

    source [N, 3, Hp, Wp] in [0, 1]; pitch [N] in degrees, NaN where unknown; codes [N, H, W] uint8 of the
    recorded depth, None without it. With `tokenizer` depth is also predicted from encoded and decoded frames.
    """
    depths = {}
    if codes is not None:  # decoded to 0 for the sky, which the warp would take for "no point"
        depths[RECORDED] = torch.from_numpy(decode_inverse_ray_distance(codes)).clamp(min=1 / FARTHEST)
    if predictor:
        depths[PREDICTED] = predictor.predict(source, pitch).cpu()
        if tokenizer:
            decoded = torch.cat(list(tokenizer.decode_frames(tokenizer.encode_frames(source))))
            depths[DECODED] = predictor.predict(decoded, pitch).cpu()
    return depths


def warp_psnr(pictures: Tensor, pose: Tensor, depths: dict[str, Tensor], fov: float) -> dict[str, Tensor]:
    """Frames warped to the poses of later ones in all ways, against those.

    pictures [N, 1+F, 3, Hp, Wp], the source first; pose [N, 1+F, 5]; depths of the source by kind. Returns
    PSNR in dB by kind, and VISIBLE with the recorded depth: [N, F].
    """
    values: dict[str, list[Tensor]] = {}
    for i in range(1, pictures.shape[1]):
        for kind, result in _warps(pictures[:, 0], depths, pose[:, 0], pose[:, i], fov).items():
            found = result if kind == VISIBLE else psnr(result, pictures[:, i])
            values.setdefault(kind, []).append(found)
    return {kind: torch.stack(found, 1) for kind, found in values.items()}


def _warps(
    source: Tensor, depths: dict[str, Tensor], pose_from: Tensor, pose_to: Tensor, fov: float
) -> dict[str, Tensor]:
    """Frames [N, 3, Hp, Wp] warped in all ways, and the share of each view that is visible [N]."""
    size = source.shape[-2] // 2, source.shape[-1] // 2
    # Relative poses: in float32 projections lose centimetres far from the world's origin.
    pose_to = camera.relative_to(pose_to, pose_from)
    pose_from = camera.relative_to(pose_from, pose_from)
    ground = camera.ground_plane(pose_to, *size, fov)
    turned, _ = camera.reproject(pose_from, pose_to, 0.0, *size, fov)
    flat, _ = camera.reproject(pose_from, pose_to, ground, *size, fov)
    made = {COPY: source, ROTATION: read_source(source, turned), GROUND: read_source(source, flat)}
    for kind, inverse in depths.items():
        _, grid, visible = warp_by_zbuffer(inverse, pose_from, pose_to, ground, fov)
        made[kind] = read_source(source, grid)
        if kind == RECORDED:
            made[VISIBLE] = visible.float().mean((1, 2))
    return made


def read_source(pictures: Tensor, grid: Tensor) -> Tensor:
    """Pictures [N, 3, Hp, Wp] read at a coarser grid [N, H, W, 2] -> [N, 3, Hp, Wp].

    The offset from the identity is interpolated: it is smooth; the grid would be cut off at the border.
    """
    size = pictures.shape[-2:]
    offset = grid.movedim(-1, 1) - camera.identity_grid(*grid.shape[1:3], grid.device)
    full = F.interpolate(offset, size, mode="bilinear") + camera.identity_grid(*size, grid.device)
    return camera.warp(pictures, full.movedim(1, -1))
