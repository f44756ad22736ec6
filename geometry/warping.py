"""Warping: frames as another camera pose sees them, by their inverse ray distances."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry import camera

EXACT_SHIFT = 0.1  # cells: a shift that is whole but for so much counts as exact (standard deviation)


@dataclass
class SourceFrames:
    """N frames of H x W cells and Hp x Wp pixels, from which views are warped."""

    picture: Tensor  # [N, 3, Hp, Wp] in [0, 1]
    tokens: Tensor  # [N, H, W]
    inverse_ray_distance: Tensor  # [N, 2H, 2W] in 1/m
    pose: Tensor  # [N, 5]

    @classmethod
    def cat(cls, *parts: "SourceFrames") -> "SourceFrames":
        """All frames of the parts, in order."""
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})


@dataclass
class WarpedView:
    """N views, each warped from source frames."""

    picture: Tensor  # [N, 3, Hp, Wp]; where no source reaches, the source's border is repeated
    tokens: Tensor  # [N, H, W] the source token nearest to each cell
    exact: Tensor  # [N, H, W] 0..1: 1 where the shift is a whole number of cells, so nothing is resampled
    visible_mask: Tensor  # [N, H, W] 0..1: share of the cell that the source shows
    inverse_ray_distance: Tensor  # [N, 2H, 2W] 1/m, seen from the view
    source_grid: Tensor  # [N, H, W, 2] where each cell's centre lies in the source, for `camera.warp`
    source_scale: Tensor  # [N, H, W] source cells per view cell, by length; below 1: magnified
    baseline: Tensor  # [N, H, W] metres between the two poses
    generation: Tensor  # [N, H, W] 0: observed; n: generated, warped from generation n-1

    def __getitem__(self, index: slice) -> "WarpedView":
        """Some of the views."""
        return WarpedView(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def warp_view(source: SourceFrames, pose_to: Tensor, initial: Tensor, fov: float) -> WarpedView:
    """Warps N frames to the poses `pose_to` [N, 5]. Computed in float32; no gradient.

    `initial` [N, 2H, 2W] (1/m) is where the search for the views' inverse ray distances begins; `fov` is the
    vertical field of view in degrees.
    """
    N, H, W = source.tokens.shape
    size = 2 * H, 2 * W
    inverse = camera.warp_inverse_ray_distance(
        source.inverse_ray_distance, source.pose, pose_to, initial, fov
    )
    grid, visible = camera.reproject(source.pose, pose_to, inverse, *size, fov)
    offset = grid.movedim(-1, 1) - camera.identity_grid(*size, grid.device)  # [N, 2, 2H, 2W]
    # The offset is smooth, so it may be interpolated; the grid itself would be cut off at the border.
    full = F.interpolate(offset, source.picture.shape[-2:], mode="bilinear")
    full = (full + camera.identity_grid(*source.picture.shape[-2:], grid.device)).movedim(1, -1)
    shift = offset * offset.new_tensor([W / 2, H / 2])[:, None, None]  # in cells
    whole = F.avg_pool2d(shift, 2).round()
    rest = (shift - F.interpolate(whole, scale_factor=2.0, mode="nearest")).abs().amax(1, keepdim=True)
    column = (torch.arange(W, device=grid.device) + whole[:, 0]).clamp(0, W - 1)
    row = (torch.arange(H, device=grid.device)[:, None] + whole[:, 1]).clamp(0, H - 1)
    nearest = (row * W + column).long().flatten(1)
    baseline = (pose_to - source.pose)[:, :3].norm(dim=-1)
    source_grid = F.avg_pool2d(grid.movedim(-1, 1), 2).movedim(1, -1)
    return WarpedView(
        picture=camera.warp(source.picture, full),
        tokens=source.tokens.flatten(1).gather(1, nearest).view(N, H, W),
        exact=(-(F.max_pool2d(rest, 2)[:, 0] / EXACT_SHIFT).square()).exp(),
        visible_mask=F.avg_pool2d(visible.float()[:, None], 2)[:, 0],
        inverse_ray_distance=inverse,
        source_grid=source_grid,
        source_scale=source_scale(source_grid),
        baseline=baseline[:, None, None].expand(N, H, W),
        generation=torch.zeros(N, H, W, device=grid.device),
    )


def source_scale(source_grid: Tensor) -> Tensor:
    """Source cells per view cell, by length: the root of the Jacobian determinant of `source_grid`.

    [N, H, W, 2] as in `WarpedView` -> [N, H, W]; 0.5 means magnified twice.
    """
    _, H, W, _ = source_grid.shape
    down, right = torch.gradient(source_grid * source_grid.new_tensor([W / 2, H / 2]), dim=(1, 2))
    return (right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]).abs().sqrt()


def fuse_views(views: WarpedView, weight: Tensor, generation: Tensor) -> WarpedView:
    """B views, each fused from K warped views of it: `views` of B*K, `weight` and `generation` [B, K].

    Each cell comes from the view whose weight times its visible mask is greatest there.
    """
    B, K = weight.shape
    H, W = views.visible_mask.shape[-2:]
    visible = views.visible_mask.view(B, K, H, W)
    best = (visible * weight[:, :, None, None]).argmax(1)  # [B, H, W]

    def gather(values: Tensor, scale: int = 1) -> Tensor:
        """[B*K, C, scale*H, scale*W] -> [B, C, scale*H, scale*W]"""
        index = F.interpolate(best[:, None].float(), scale_factor=float(scale), mode="nearest").long()
        values = values.view(B, K, *values.shape[1:])
        index = index[:, None].expand(-1, -1, values.shape[2], -1, -1)
        return values.gather(1, index)[:, 0]

    generation = generation[:, :, None, None].expand(B, K, H, W)
    return WarpedView(
        picture=gather(views.picture, views.picture.shape[-2] // H),
        tokens=gather(views.tokens[:, None])[:, 0],
        exact=gather(views.exact[:, None])[:, 0],
        visible_mask=gather(views.visible_mask[:, None])[:, 0] * (weight.amax(1) > 0)[:, None, None],
        inverse_ray_distance=gather(views.inverse_ray_distance[:, None], 2)[:, 0],
        source_grid=gather(views.source_grid.movedim(-1, 1)).movedim(1, -1),
        source_scale=gather(views.source_scale[:, None])[:, 0],
        baseline=gather(views.baseline[:, None])[:, 0],
        generation=gather(generation.reshape(B * K, 1, H, W))[:, 0],
    )
