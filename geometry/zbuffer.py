"""Forward warping of depth with a z-buffer: what a frame shows, as another pose sees it.

Each point of the source is projected into the view, and the nearest one wins. Unlike the backward search in
`camera.warp_inverse_ray_distance` this handles occlusion: what no source point covers is disoccluded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry import camera

SPLAT_DENSITY = 2  # source points per pixel, by length: magnified surfaces keep fewer cracks
CRACK_PIXELS = 4  # a gap is closed if there are points so near on both sides
ONE_SURFACE = 1.3  # inverse ray distances within this factor belong to one surface
OCCLUDED = 1.3  # a source shows something else at a place if it is so many times nearer than expected


def splat_inverse_ray_distance(inverse: Tensor, pose_from: Tensor, pose_to: Tensor, fov: float) -> Tensor:
    """Inverse ray distances [N, H, W] (1/m) of the views at `pose_to` [N, 5], from those at `pose_from`.

    0 where no point of the source lands. A point at ray distance 1/q along the unit ray d of the source lies
    at R_from d / q + c_from; times q, which does not change its position in the picture, the view sees it at
    p = R_to^T (R_from d + (c_from - c_to) q), at the inverse ray distance q / |p|. No gradient.
    """
    N, H, W = inverse.shape
    dense = inverse.repeat_interleave(SPLAT_DENSITY, 1).repeat_interleave(SPLAT_DENSITY, 2)
    h, w = dense.shape[-2:]
    q = dense.reshape(N, -1, 1)
    rays = camera.rays(h, w, fov, inverse.device, inverse.dtype).view(1, -1, 3)
    # Rotations relative to the source's yaw, so that one matrix product per source is enough.
    zero = torch.zeros_like(pose_from[:, 3])
    to_level = camera.rotation(zero, pose_from[:, 4])
    to_view = camera.rotation(pose_to[:, 3] - pose_from[:, 3], pose_to[:, 4])
    step = camera.position(camera.relative_to(pose_from, pose_to))  # metres, world axes
    step = torch.einsum("nij,ni->nj", camera.rotation(pose_from[:, 3], zero), step)
    turn = to_level.mT @ to_view  # row vectors: source camera -> view camera
    points = rays @ turn + q * (step[:, None] @ to_view)
    grid, inside = camera.project(points, H, W, fov)
    column = ((grid[..., 0] + 1) * (W / 2) - 0.5).round().long().clamp(0, W - 1)
    row = ((grid[..., 1] + 1) * (H / 2) - 0.5).round().long().clamp(0, H - 1)
    value = torch.where(inside, q[..., 0] / points.norm(dim=-1).clamp(min=camera.NEAREST), 0.0)
    view = torch.zeros(N, H * W, device=inverse.device, dtype=inverse.dtype)
    return view.scatter_reduce_(1, row * W + column, value, reduce="amax").view(N, H, W)


def close_cracks(splatted: Tensor, reach: int = CRACK_PIXELS) -> Tensor:
    """Fills gaps in splatted inverse ray distances [N, H, W], which open where a surface is magnified.

    A pixel without a point is in a gap if there are points within `reach` pixels on its left and its right,
    or then above and below. It takes the mean of the two if they are of one surface, else the farther one:
    through a gap one sees what is behind.
    """
    for dim in (2, 1):
        sides = (_nearest_point(splatted, dim, direction, reach) for direction in (1, -1))
        splatted = torch.where(splatted > 0, splatted, _between(*sides))
    return splatted


def _nearest_point(splatted: Tensor, dim: int, direction: int, reach: int) -> Tensor:
    """The value of the nearest pixel with a point, up to `reach` pixels away in one direction; 0: none."""
    found, length = splatted, splatted.shape[dim]
    for _ in range(reach):
        step = F.pad(found, [0, 0] * (2 - dim) + ([1, 0] if direction > 0 else [0, 1]))
        step = step.narrow(dim, 0 if direction > 0 else 1, length)
        found = torch.where(found > 0, found, step)
    return found


def _between(a: Tensor, b: Tensor) -> Tensor:
    """The value between two inverse ray distances, 0 if one of them is 0, see `close_cracks`."""
    farther, nearer = torch.minimum(a, b), torch.maximum(a, b)
    return torch.where(nearer < ONE_SURFACE * farther, (farther + nearer) / 2, farther)


def warp_by_zbuffer(
    inverse: Tensor, pose_from: Tensor, pose_to: Tensor, fallback: Tensor, fov: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each pixel of the views at `pose_to` lies in their sources, by splatting the sources' depth.

    inverse [N, H, W] (1/m) of the sources; `fallback` [N, H, W] (1/m) is taken where nothing lands. Returns
    the views' inverse ray distances [N, H, W], the sampling grid [N, H, W, 2] for `camera.warp`, and the
    visible mask [N, H, W]: True where a source point lands and the source shows it. In a closed gap the
    source may show something nearer at that place; the gap then is a disocclusion.
    """
    H, W = inverse.shape[-2:]
    splatted = splat_inverse_ray_distance(inverse, pose_from, pose_to, fov)
    closed = close_cracks(splatted)
    view = torch.where(closed > 0, closed, fallback)
    grid, inside, expected = camera.reproject_with_distance(pose_from, pose_to, view, H, W, fov)
    shown = F.grid_sample(inverse[:, None], grid, mode="nearest", padding_mode="border", align_corners=False)
    visible = inside & ((splatted > 0) | ((closed > 0) & (shown[:, 0] < OCCLUDED * expected)))
    return view, grid, visible
