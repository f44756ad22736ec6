"""Losses of a predicted depth without labels: pictures of other poses must agree with it.

Each pixel of a picture, at its predicted distance, has a place in the pictures before and after it, whose
poses are recorded. What these show there must look alike. Zhou et al. (arXiv 1704.07813); photometric error
and smoothness as in monodepth (arXiv 1609.03677); the minimum over the other pictures and the mask of pixels
that look alike unwarped as in monodepth2 (arXiv 1806.01260). Poses are recorded, so distances are in metres.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry import camera
from geometry.zbuffer import OCCLUDED, close_cracks, splat_inverse_ray_distance

SSIM_SHARE = 0.85  # of the photometric error; the rest is the absolute difference
EDGE_SHARPNESS = 10.0  # a depth edge costs exp(-EDGE_SHARPNESS * picture edge) of its height


@dataclass(frozen=True)
class Views:
    """Recorded pictures [N, 3, Hp, Wp] in [0, 1], and those of S other frames that show the same place."""

    picture: Tensor  # [N, 3, Hp, Wp]
    pose: Tensor  # [N, 5], x, y, z relative to any one point of each sample
    others: Tensor  # [N, S, 3, Hp, Wp]
    other_poses: Tensor  # [N, S, 5], relative to the same point; NaN: there is no such frame

    def flip(self, where: Tensor) -> "Views":
        """Mirrors the samples `where` [N] bool left-right: pictures and, with x and yaw negated, poses."""
        mirrored = self.pose.new_tensor([-1.0, 1.0, 1.0, -1.0, 1.0])
        pixels = where[:, None, None, None]
        return Views(
            torch.where(pixels, self.picture.flip(-1), self.picture),
            torch.where(where[:, None], self.pose * mirrored, self.pose),
            torch.where(pixels[:, None], self.others.flip(-1), self.others),
            torch.where(where[:, None, None], self.other_poses * mirrored, self.other_poses),
        )

    def to(self, device: torch.device) -> "Views":
        """On a device."""
        return Views(*(part.to(device) for part in vars(self).values()))


def photometric_error(a: Tensor, b: Tensor) -> Tensor:
    """Difference of pictures [N, 3, H, W] at each pixel [N, H, W], 0 to 1: SSIM over 3x3 pixels, and L1.

    Differentiable. SSIM forgives a change of light, L1 counts in flat areas, where SSIM is noise.
    """

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    unlike = ((1 - ssim) / 2).clamp(0, 1)
    return (SSIM_SHARE * unlike + (1 - SSIM_SHARE) * (a - b).abs()).mean(1)


@torch.no_grad()
def shown_by_others(inverse: Tensor, pose: Tensor, other_poses: Tensor, fov: float) -> Tensor:
    """Which pixels of the views at `pose` [N, 5] the views at `other_poses` [N, 5] show: [N, H, W] bool.

    inverse [N, H, W] (1/m) is that of the views at `pose`. A point is not shown if it is outside the other
    picture or if a nearer surface of the same view lies before it there.
    """
    size = inverse.shape[-2:]
    grid, inside, expected = camera.reproject_with_distance(other_poses, pose, inverse, *size, fov)
    nearest = close_cracks(splat_inverse_ray_distance(inverse, pose, other_poses, fov))
    found = F.grid_sample(nearest[:, None], grid, mode="nearest", padding_mode="border", align_corners=False)
    return inside & (found[:, 0] < OCCLUDED * expected)


def reprojection_error(log_inverse: Tensor, views: Views, fov: float) -> tuple[Tensor, Tensor]:
    """Photometric error of the other pictures, read where the depth says, and the share of pixels compared.

    log_inverse [N, H, W] of `views.picture`, log(1/m). For each pixel the best of the other frames counts, of
    those that show it; pixels that look better without any warp (a still camera, what moves along) do not
    count. Both results are scalars: the mean over the pixels that count, 0 if none does. Compared at the size
    of the depth: the gradient of finer pictures reaches less far, and costs four times as much.
    """
    size, (N, S) = log_inverse.shape[-2:], views.other_poses.shape[:2]
    known = views.other_poses.isfinite().all(-1)  # [N, S]
    pose = views.pose.repeat_interleave(S, 0)
    other_poses = torch.where(known[..., None], views.other_poses, views.pose[:, None]).flatten(0, 1)
    inverse = log_inverse.exp().repeat_interleave(S, 0)
    own = F.adaptive_avg_pool2d(views.picture, size).repeat_interleave(S, 0)
    others = F.adaptive_avg_pool2d(views.others.flatten(0, 1), size)
    grid, _ = camera.reproject(other_poses, pose, inverse, *size, fov)
    hidden = ~shown_by_others(inverse, pose, other_poses, fov) | ~known.flatten()[:, None, None]
    warped = photometric_error(camera.warp(others, grid), own).masked_fill(hidden, torch.inf)
    same = photometric_error(others, own).masked_fill(~known.flatten()[:, None, None], torch.inf)
    best, still = (error.unflatten(0, (N, S)).amin(1) for error in (warped, same))
    counts = best < still  # never where both are infinite
    return torch.where(counts, best, 0.0).sum() / counts.sum().clamp(min=1), counts.float().mean()


def smoothness_error(log_inverse: Tensor, picture: Tensor) -> Tensor:
    """Mean change of log inverse ray distances [N, H, W] between neighbours where the picture has no edge.

    `picture` [N, 3, Hp, Wp]. It decides where no texture does; a scalar.
    """
    small = F.adaptive_avg_pool2d(picture, log_inverse.shape[-2:])
    terms = []
    for dim in (1, 2):
        edge = small.diff(dim=dim + 1).abs().mean(1)
        terms.append((log_inverse.diff(dim=dim).abs() * (-EDGE_SHARPNESS * edge).exp()).mean())
    return torch.stack(terms).sum()
