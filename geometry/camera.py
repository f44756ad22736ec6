"""Pinhole geometry: mapping the pixels of a picture at one pose to a picture at another. Differentiable,
batched.

Ray distance: metres from the eye along the ray, the same while the camera turns. Axial depth: metres along
the optical axis. This project stores inverse ray distances, in 1/m.

Camera axes: x right, y down, z forward; pixels are square and the principal point is the picture's centre.
World axes of this module: those of a camera at yaw 0 and pitch 0, so y is down here too. A pose
[x, y, z, yaw, pitch] is in Minecraft's convention, in metres and degrees: y up,
forward = (-sin yaw, 0, cos yaw), right = (-cos yaw, 0, -sin yaw), +yaw right, +pitch down. Its [x, y, z] is
[-x, -y, z] here.

Pinhole projection and homographies: Hartley and Zisserman, Multiple View Geometry in Computer Vision, 2nd
edition, sections 6.1 and 13.1-13.2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EYE_HEIGHT = 1.62  # metres from the ground to the eye of a standing Minecraft player; Luanti's is 1.47
FAR_RAY_DISTANCE = 20.0  # metres, for rays above the horizon and ground farther away; tuned on recorded walks
# Directions that count as straight ahead: degrees to each side and up and down, and rays over that range.
AHEAD_DEGREES = ((13.0, 7), (3.0, 3))
NEAREST = 1e-4  # least z of a point that counts as in front of the camera


def focal_length(height: int, vertical_fov_degrees: float) -> float:
    """Focal length in pixels of a picture of `height` pixels: (height / 2) / tan(fov / 2).

    Raises ValueError unless the field of view lies between 0 and 180 degrees.
    """
    if not 0 < vertical_fov_degrees < 180:
        raise ValueError(f"vertical field of view {vertical_fov_degrees}: expected degrees between 0 and 180")
    return height / 2 / math.tan(math.radians(vertical_fov_degrees) / 2)


def rotation(yaw: Tensor, pitch: Tensor) -> Tensor:
    """Degrees [...] -> camera-to-world matrices R = R_yaw R_pitch [..., 3, 3]; pitch is absolute, no roll.

    R_yaw turns about the world's vertical axis, R_pitch about the camera's x axis. R_b^T R_a maps a ray in
    the axes of camera a to those of camera b; it is the rotation in the homography K R_b^T R_a K^-1 between
    two pictures from one position.
    """
    yaw, pitch = torch.broadcast_tensors(torch.deg2rad(yaw), torch.deg2rad(pitch))
    cy, sy, cp, sp = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin()
    zero = torch.zeros_like(cy)
    rows = [[cy, -sy * sp, sy * cp], [zero, cp, sp], [-sy, -cy * sp, cy * cp]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def rays(
    height: int,
    width: int,
    vertical_fov_degrees: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Directions through the pixels' centres, in camera axes, of unit length: [H, W, 3]."""
    focal = focal_length(height, vertical_fov_degrees)
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5 - width / 2) / focal
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5 - height / 2) / focal
    y, x = torch.meshgrid(y, x, indexing="ij")
    return F.normalize(torch.stack([x, y, torch.ones_like(x)], -1), dim=-1)


def descent(pitch: Tensor, height: int, width: int, vertical_fov_degrees: float) -> Tensor:
    """Metres that the rays through the pixels descend per metre, at a pitch [B] in degrees: [B, H, W]."""
    down = rotation(torch.zeros_like(pitch), pitch)[:, 1]  # [B, 3]: the world's y of a camera ray
    directions = rays(height, width, vertical_fov_degrees, pitch.device, pitch.dtype)
    return torch.einsum("bj,hwj->bhw", down, directions)


def elevation(pitch: Tensor, height: int, width: int, vertical_fov_degrees: float) -> Tensor:
    """Degrees over the horizon of the pixels of pictures at a pitch [B] in degrees: [B, H, W]."""
    return -torch.rad2deg(torch.asin(descent(pitch, height, width, vertical_fov_degrees).clamp(-1, 1)))


def project(points: Tensor, height: int, width: int, vertical_fov_degrees: float) -> tuple[Tensor, Tensor]:
    """Points or directions in camera axes [..., 3] -> their positions in the picture [..., 2] and [...] bool.

    Positions are those of grid_sample (align_corners=False): -1 and +1 are the picture's edges. The mask is
    True for points in front of the camera and inside the picture. Positions of points behind the camera are
    finite but meaningless.
    """
    focal = focal_length(height, vertical_fov_degrees)
    z = points[..., 2].clamp(min=NEAREST)
    grid = torch.stack(
        [points[..., 0] / z * (2 * focal / width), points[..., 1] / z * (2 * focal / height)], -1
    )
    x, y = grid.abs().unbind(-1)
    return grid, (points[..., 2] > NEAREST) & (x <= 1) & (y <= 1)


def position(pose: Tensor) -> Tensor:
    """Pose [..., 5] -> position of the eye in this module's world axes [..., 3], metres."""
    return pose[..., :3] * pose.new_tensor([-1.0, -1.0, 1.0])


def reproject(
    pose_from: Tensor,
    pose_to: Tensor,
    inverse_ray_distance: Tensor | float,
    height: int,
    width: int,
    vertical_fov_degrees: float,
) -> tuple[Tensor, Tensor]:
    """The position in the picture at `pose_from` [B, 5] of each pixel of the picture at `pose_to` [B, 5].

    `inverse_ray_distance` (1/m, broadcast to [B, H, W]) is that of the picture at `pose_to`; 0 is infinitely
    far, where only the rotation matters. Returns the sampling grid [B, H, W, 2] for `warp` and the mask
    [B, H, W] of pixels visible from `pose_from`.

    The point at distance t along a ray d is at c_to + t R_to d in the world. In the axes of `pose_from`,
    divided by t, which does not change its projection, it is R_from^T (R_to d + (c_to - c_from) / t).
    """
    grid, visible, _ = reproject_with_distance(
        pose_from, pose_to, inverse_ray_distance, height, width, vertical_fov_degrees
    )
    return grid, visible


def reproject_with_distance(
    pose_from: Tensor,
    pose_to: Tensor,
    inverse_ray_distance: Tensor | float,
    height: int,
    width: int,
    vertical_fov_degrees: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reproject`, and the inverse ray distances [B, H, W] (1/m) of the same points from `pose_from`."""
    directions, moved, tilt = _relative_rays(pose_from, pose_to, height, width, vertical_fov_degrees)
    inverse = torch.as_tensor(inverse_ray_distance, device=pose_to.device, dtype=pose_to.dtype)
    inverse = inverse.expand(len(pose_to), height, width)
    world = directions + inverse[..., None] * moved[:, None, None]
    grid, visible = project(world @ tilt, height, width, vertical_fov_degrees)
    return grid, visible, inverse / world.norm(dim=-1).clamp(min=NEAREST)


def _relative_rays(
    pose_from: Tensor, pose_to: Tensor, height: int, width: int, vertical_fov_degrees: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Geometry of two views in level axes with the yaw of `pose_from`.

    Returns the rays of the picture at `pose_to` [B, H, W, 3], the displacement from `pose_from` to
    `pose_to` [B, 3] in metres, and the pitch rotation of `pose_from` [B, 1, 3, 3]: a row vector times it is
    in camera axes.
    """
    turn = pose_to[:, 3] - pose_from[:, 3]
    to_level = rotation(turn, pose_to[:, 4])  # [B, 3, 3]
    zero = torch.zeros_like(turn)
    moved = torch.einsum("bij,bi->bj", rotation(pose_from[:, 3], zero), position(pose_to - pose_from))
    directions = rays(height, width, vertical_fov_degrees, pose_to.device, pose_to.dtype)
    level = (directions.view(1, -1, 3) @ to_level.mT).view(-1, height, width, 3)
    return level, moved, rotation(zero, pose_from[:, 4])[:, None]


def warp_inverse_ray_distance(
    inverse: Tensor,
    pose_from: Tensor,
    pose_to: Tensor,
    initial: Tensor,
    vertical_fov_degrees: float,
    rounds: int = 2,
) -> Tensor:
    """Inverse ray distances [B, H, W] (1/m) of the picture at `pose_from`, resampled to that at `pose_to`.

    The source pixel that a target pixel shows depends on the distance to be computed. So both are computed
    alternately, `rounds` times (fixed-point iteration), starting from `initial` [B, H, W]. Outside the
    source its border is repeated. Gradients reach `inverse` through the last iteration only.
    """
    height, width = inverse.shape[-2:]
    directions, moved, tilt = _relative_rays(pose_from, pose_to, height, width, vertical_fov_degrees)
    moved = moved[:, None, None]
    result = initial
    for _ in range(rounds):
        level = directions + result.detach()[..., None] * moved
        grid, _ = project(level @ tilt, height, width, vertical_fov_degrees)
        there = warp(inverse[:, None], grid)[:, 0]
        # The point is at 1/there along the source ray; subtracting the displacement gives it relative to the
        # target eye (all divided by its distance from the source).
        point = F.normalize(level, dim=-1) - there[..., None] * moved
        result = there / point.norm(dim=-1).clamp(min=NEAREST)
    return result


def ground_plane(
    pose_to: Tensor,
    height: int,
    width: int,
    vertical_fov_degrees: float,
    eye_height: float = EYE_HEIGHT,
    far: float = FAR_RAY_DISTANCE,
) -> Tensor:
    """Inverse ray distances [B, H, W] in 1/m of a flat ground `eye_height` metres below the eye at `pose_to`.

    A unit ray that descends by s metres per metre meets the ground at distance eye_height / s, so the inverse
    is s / eye_height. Rays that meet it beyond `far`, or never, get 1 / far.
    """
    return (descent(pose_to[:, 4], height, width, vertical_fov_degrees) / eye_height).clamp(min=1 / far)


def disoccluded_mask(
    pose_from: Tensor, pose_to: Tensor, height: int, width: int, vertical_fov_degrees: float
) -> Tensor:
    """[B, H, W] bool: pixels of the view at `pose_to` [B, 5] that are not visible from `pose_from` [B, 5].

    A flat ground is assumed. False where a pose is unknown (NaN).
    """
    pose_from, pose_to = relative_to_first(torch.stack([pose_from, pose_to], 1)).unbind(1)
    ground = ground_plane(pose_to, height, width, vertical_fov_degrees)
    _, visible = reproject(pose_from, pose_to, ground, height, width, vertical_fov_degrees)
    known = pose_from.isfinite().all(1) & pose_to.isfinite().all(1)
    return ~visible & known[:, None, None]


def distance_ahead(
    inverse_ray_distance: Tensor, pitch: Tensor, heading: Tensor, vertical_fov_degrees: float
) -> Tensor:
    """Metres [B] from the eye to the surface straight ahead at its own height; infinite where that is not in
    the picture.

    inverse_ray_distance [B, H, W] (1/m); pitch [B] of the camera and heading [B] relative to its yaw, in
    degrees. It is the median over AHEAD_DEGREES to each side and up and down.
    """
    sideways, upwards = (torch.linspace(-a, a, n, device=pitch.device) for a, n in AHEAD_DEGREES)
    yaw = torch.deg2rad(heading[:, None, None] + sideways[:, None])  # [B, n, 1]
    up = torch.deg2rad(upwards)
    parts = torch.broadcast_tensors(yaw.sin() * up.cos(), -up.sin(), yaw.cos() * up.cos())
    directions = torch.stack(parts, -1).flatten(1, 2)  # [B, N, 3]
    height, width = inverse_ray_distance.shape[-2:]
    seen = directions @ rotation(torch.zeros_like(pitch), pitch)  # row vectors, in camera axes
    grid, visible = project(seen, height, width, vertical_fov_degrees)
    inverse = F.grid_sample(
        inverse_ray_distance[:, None],
        grid[:, None],
        mode="nearest",
        padding_mode="border",
        align_corners=False,
    )[:, 0, 0]
    return torch.where(visible.float().mean(1) > 0.5, inverse.median(1).values.reciprocal(), torch.inf)


def identity_grid(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """The positions of the pixels' own centres: [2, H, W], x then y, -1 and +1 being the picture's edges."""
    x = (2 * torch.arange(width, device=device) + 1) / width - 1
    y = (2 * torch.arange(height, device=device) + 1) / height - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))


def warp(pictures: Tensor, grid: Tensor) -> Tensor:
    """Samples pictures [B, C, H, W] bilinearly at the positions of a grid [B, H', W', 2] -> [B, C, H', W'].

    Positions outside get the nearest border pixel (zeros would be decoded as black).
    """
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def relative_to(pose: Tensor, origin: Tensor) -> Tensor:
    """Poses [..., 5] with x, y, z relative to those of `origin` [..., 5]; angles stay absolute.

    Far from the world's origin, float32 projections of absolute positions lose centimetres.
    """
    return torch.cat([pose[..., :3] - origin[..., :3], pose[..., 3:]], -1)


def relative_to_first(pose: Tensor) -> Tensor:
    """Poses [B, T, 5] with x, y, z relative to whole metres near the first of each sequence.

    Whole metres, because the nodes of a voxel world lie on a lattice of 1 m that poses must not lose.
    """
    return relative_to(pose, pose[:, :1].round())
