"""Composing the next view: frames seen earlier, warped to a new camera pose and fused.

Each source is warped by its own depth with a z-buffer (zbuffer.py). The sources are then fused by agreement:

1. A point is discarded if more sources contradict it, that is, see through it, than support it. Depth is
   predicted and noisy; if the nearest point always won, the errors of all sources would collect in front.
2. Points far behind the nearest remaining one of a pixel are hidden.
3. Of the rest the source with the least parallax wins, because errors of its depth shift the picture least;
   among equal ones that of the highest resolution.

The constants were chosen by the PSNR of views composed of four frames, see docs/experiments.md.

What no source shows is disoccluded; it is filled, but marked as such.

A warp that magnifies loses detail, and so does each resampling. The resolution that is left is tracked for
each cell over all warps since the cell was recorded or sampled.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry import camera
from geometry.zbuffer import warp_by_zbuffer

EXACT_SHIFT = 0.1  # cells: a shift that is whole but for so much counts as exact (standard deviation)
SEEN_THROUGH = 1.1  # a source contradicts a point if it sees so many times farther in the point's direction
SUPPORTED = 1.1  # a source supports a point if it sees a surface at its distance, within this factor
RELIABLE_METRES = 0.3  # the vote of a source weighs 1 / (this + its distance from the view)
SAME_SURFACE = 0.2  # a point of less than this share of the nearest inverse distance is hidden behind it
PARALLAX_COST = 8.0  # of a source's score, per metre of baseline over a metre of distance
RESOLUTION_MAX = 1.0  # a source of a higher resolution than the view's is no better
BORDER = 2  # pixels that bicubic interpolation may read beyond the border
RESAMPLED = 0.93  # resolution that a cell keeps when it is resampled without a change of scale


@dataclass
class SourceFrames:
    """N frames of H x W cells and Hp x Wp pixels, from which views are warped."""

    picture: Tensor  # [N, 3, Hp, Wp] in [0, 1]
    tokens: Tensor  # [N, H, W]
    inverse_ray_distance: Tensor  # [N, 2H, 2W] in 1/m
    pose: Tensor  # [N, 5]
    resolution: Tensor  # [N, H, W] of the cells, by length: 1 as recorded, 0.5 magnified twice since then

    @classmethod
    def cat(cls, *parts: "SourceFrames") -> "SourceFrames":
        """All frames of the parts, in order."""
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})


@dataclass
class ComposedView:
    """B views, each composed from K sources."""

    picture: Tensor  # [B, 3, Hp, Wp]
    tokens: Tensor  # [B, H, W] the source token nearest to each cell
    exact: Tensor  # [B, H, W] 0..1: 1 where the shift is a whole number of cells, so nothing is resampled
    visible_mask: Tensor  # [B, H, W] 0..1: share of the cell that some source shows
    inverse_ray_distance: Tensor  # [B, 2H, 2W] 1/m, seen from the view; the fallback where disoccluded
    visible_pixels: Tensor  # [B, 2H, 2W] bool, where inverse_ray_distance comes from a source
    fallback: Tensor  # [B, 2H, 2W] 1/m, what was assumed elsewhere
    resolution: Tensor  # [B, H, W] source cells per view cell, by length, times the resolution of the source
    disagreement: Tensor  # [B, H, W] 0..1: share of the sources' points that were contradicted
    source: Tensor  # [B, H, W] index in 0..K-1 of the source of each cell
    source_grid: Tensor  # [B, H, W, 2] where each cell's centre lies in source 0, for `camera.warp`


def compose_view(
    sources: SourceFrames, usable: Tensor, penalty: Tensor, pose: Tensor, fallback: Tensor, fov: float
) -> ComposedView:
    """The views at `pose` [B, 5] from B*K sources; no gradient.

    usable [B, K] bool: the source may be used. penalty [B, K]: subtracted from the source's resolution when
    the best one is chosen. fallback [B, 2H, 2W] (1/m): the assumed inverse ray distance of what no
    source shows; its colour is read from source 0, with the border repeated. `fov`: vertical field of view in
    degrees.
    """
    B, K = usable.shape
    N, H, W = sources.tokens.shape
    h, w = 2 * H, 2 * W
    Hp, Wp = sources.picture.shape[-2:]
    per_source = pose.repeat_interleave(K, 0)

    # Where each source would be read for each pixel of the view.
    filled = fallback.repeat_interleave(K, 0)
    inverse, grid, shown = warp_by_zbuffer(
        sources.inverse_ray_distance, sources.pose, per_source, filled, fov
    )
    shown &= usable.view(N, 1, 1)
    offset = grid.movedim(-1, 1) - camera.identity_grid(h, w, grid.device)  # smooth, so it may be resampled
    before = F.grid_sample(sources.resolution[:, None], grid, padding_mode="border", align_corners=False)
    resolution = (source_scale(grid) * before[:, 0]).view(B, K, h, w)

    # Fusion.
    points = torch.where(shown, inverse, 0.0).view(B, K, h, w)
    contradicted = contradicted_points(points[..., ::2, ::2], sources, usable, pose, fov)
    contradicted = contradicted.repeat_interleave(2, 2).repeat_interleave(2, 3)
    candidates = points.masked_fill(contradicted, 0.0)
    nearest = candidates.amax(1, keepdim=True)
    baseline = (pose[:, None] - sources.pose.view(B, K, 5))[..., :3].norm(dim=-1)
    parallax = baseline[:, :, None, None] * candidates
    score = resolution.clamp(max=RESOLUTION_MAX) - PARALLAX_COST * parallax - penalty[:, :, None, None]
    score = score.masked_fill((candidates <= SAME_SURFACE * nearest) | (candidates <= 0), -torch.inf)
    best = score.max(1, keepdim=True)
    visible = best.values[:, 0] > -torch.inf
    chosen = torch.where(visible[:, None], best.indices, 0)  # [B, 1, h, w]

    # Colours: all sources of a view stacked into one tall picture, read once. Bicubic, since each bilinear
    # resampling would take a tenth of the gradient. The kernel reaches beyond a source's border, so the
    # outermost rows are repeated.
    index = F.interpolate(chosen.float(), (Hp, Wp), mode="nearest").long()
    of_chosen = offset.view(B, K, 2, h, w).gather(1, chosen[:, :, None].expand(-1, -1, 2, -1, -1))[:, 0]
    # The offset may be interpolated within a source, but not across the border of two.
    border = chosen.float()
    border = F.max_pool2d(border, 3, 1, 1) != -F.max_pool2d(-border, 3, 1, 1)
    full = torch.where(
        F.interpolate(border.float(), (Hp, Wp), mode="nearest") > 0,
        F.interpolate(of_chosen, (Hp, Wp), mode="nearest"),
        F.interpolate(of_chosen, (Hp, Wp), mode="bilinear"),
    )
    full = full + camera.identity_grid(Hp, Wp, grid.device)
    x, y = full[:, 0], full[:, 1].clamp(1 / Hp - 1, 1 - 1 / Hp)
    tall = Hp + 2 * BORDER
    row = index[:, 0] * tall + BORDER + ((y + 1) * Hp - 1) / 2  # pixels
    y = (2 * row + 1) / (K * tall) - 1
    padded = F.pad(sources.picture, (0, 0, BORDER, BORDER), mode="replicate").view(B, K, 3, tall, Wp)
    stacked = padded.transpose(1, 2).reshape(B, 3, K * tall, Wp)
    picture = F.grid_sample(
        stacked, torch.stack([x, y], -1), mode="bicubic", padding_mode="border", align_corners=False
    ).clamp(0, 1)

    # Tokens: a cell is exact if all its pixels come from one source by the same whole shift.
    shift = offset * offset.new_tensor([W / 2, H / 2])[:, None, None]  # in cells
    whole = F.avg_pool2d(shift, 2).round()
    rest = (shift - F.interpolate(whole, scale_factor=2.0, mode="nearest")).abs().amax(1, keepdim=True)
    exact = (-(F.max_pool2d(rest, 2)[:, 0] / EXACT_SHIFT).square()).exp().view(B, K, H, W)
    column = (torch.arange(W, device=grid.device) + whole[:, 0]).clamp(0, W - 1)
    row = (torch.arange(H, device=grid.device)[:, None] + whole[:, 1]).clamp(0, H - 1)
    place = (row * W + column).long().flatten(1)
    tokens = sources.tokens.flatten(1).gather(1, place).view(B, K, H, W)
    quarters = F.pixel_unshuffle(torch.where(visible[:, None], chosen, -1), 2)  # [B, 4, H, W]
    source = quarters[:, :1].clamp(min=0)
    one_source = (quarters == source).all(1)

    return ComposedView(
        picture=picture,
        tokens=tokens.gather(1, source)[:, 0],
        exact=exact.gather(1, source)[:, 0] * one_source,
        visible_mask=F.avg_pool2d(visible[:, None].float(), 2)[:, 0],
        inverse_ray_distance=torch.where(visible, candidates.gather(1, chosen)[:, 0], fallback),
        visible_pixels=visible,
        fallback=fallback,
        resolution=F.avg_pool2d(resolution.gather(1, chosen), 2)[:, 0],
        disagreement=F.avg_pool2d(contradicted.float().amax(1, keepdim=True), 2)[:, 0],
        source=source[:, 0],
        source_grid=F.avg_pool2d(grid.view(B, K, h, w, 2)[:, 0].movedim(-1, 1), 2).movedim(1, -1),
    )


def contradicted_points(
    points: Tensor, sources: SourceFrames, usable: Tensor, pose: Tensor, fov: float
) -> Tensor:
    """[B, K, h, w] bool: points of a view that more sources contradict than support.

    points [B, K, h, w]: inverse ray distances (1/m) from the view at `pose` [B, 5], 0 where there is none.
    Source j contradicts a point if it sees farther than it, by SEEN_THROUGH, in all of a neighbourhood of
    3 x 3 pixels, and supports it if it sees a surface within SUPPORTED of it. The point's own source supports
    it. Sources that are not `usable` [B, K] have no vote.
    """
    B, K, h, w = points.shape
    depth = sources.inverse_ray_distance
    rows, columns = depth.shape[-2:]
    if K == 1:
        return torch.zeros_like(points, dtype=torch.bool)
    inverse = points.clamp(min=camera.NEAREST).view(B, K * h * w, 1)
    rays = camera.rays(h, w, fov, points.device, points.dtype).view(1, -1, 3).expand(B, -1, -1)
    world = rays @ camera.rotation(pose[:, 3], pose[:, 4]).mT  # [B, h*w, 3]
    world = world.repeat(1, K, 1)  # the points of all sources, divided by their distance
    eyes = camera.position(pose[:, None] - sources.pose.view(B, K, 5))  # [B, K, 3]
    there = world[:, None] + inverse[:, None] * eyes[:, :, None]  # [B, K (seen by), K*h*w, 3]
    turn = camera.rotation(sources.pose[:, 3], sources.pose[:, 4]).view(B, K, 3, 3)
    seen = there @ turn
    grid, inside = camera.project(seen, rows, columns, fov)
    expected = inverse[:, None, :, 0] / there.norm(dim=-1).clamp(min=camera.NEAREST)  # from source j
    nearest = F.max_pool2d(depth[:, None], 3, stride=1, padding=1)
    there_depth = F.grid_sample(nearest, grid.view(B * K, K * h, w, 2), mode="nearest", align_corners=False)
    there_depth = there_depth.view(B, K, K, h, w)
    expected, inside = expected.view(B, K, K, h, w), inside.view(B, K, K, h, w)
    against = inside & (there_depth * SEEN_THROUGH < expected)
    ratio = there_depth / expected.clamp(min=camera.NEAREST)
    support = inside & (ratio < SUPPORTED) & (ratio > 1 / SUPPORTED)
    own = torch.eye(K, dtype=torch.bool, device=points.device)[None, :, :, None, None]
    weight = 1 / (RELIABLE_METRES + (pose[:, None] - sources.pose.view(B, K, 5))[..., :3].norm(dim=-1))
    weight = (weight * usable)[:, :, None, None, None]
    votes = ((support | own).float() - (against & ~own).float()) * weight
    return (votes.sum(1) < 0) & (points > 0)


def source_scale(grid: Tensor) -> Tensor:
    """Source cells per view cell, by length: the root of the Jacobian determinant of a sampling grid.

    [N, H, W, 2] as in `ComposedView` -> [N, H, W]; 0.5 means magnified twice.
    """
    _, H, W, _ = grid.shape
    down, right = torch.gradient(grid * grid.new_tensor([W / 2, H / 2]), dim=(1, 2))
    return (right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]).abs().sqrt()
