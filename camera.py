"""Pinhole geometry: where a picture taken at one pose is seen from another. Differentiable, batched.

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
FAR = 20.0  # metres, distance given to what is above the horizon or farther; found by trial on recorded walks
NEAREST = 1e-4  # least z of a ray of unit length that counts as in front of the camera


def focal_length(height: int, vertical_fov_degrees: float) -> float:
    """Focal length in pixels of a picture of `height` pixels: (height / 2) / tan(fov / 2).

    Raises ValueError unless the field of view lies between 0 and 180 degrees.
    """
    if not 0 < vertical_fov_degrees < 180:
        raise ValueError(f"vertical field of view {vertical_fov_degrees}: expected degrees between 0 and 180")
    return height / 2 / math.tan(math.radians(vertical_fov_degrees) / 2)


def rotation(yaw: Tensor, pitch: Tensor) -> Tensor:
    """Degrees [...] -> camera-to-world matrices R = R_yaw R_pitch [..., 3, 3]; pitch is absolute, no roll.

    R_yaw turns about the world's vertical, R_pitch about the camera's x axis. From camera a to camera b a ray
    goes by R_b^T R_a, the rotation in the homography K R_b^T R_a K^-1 of two pictures from one place.
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
    """Directions through the pixels' centres, in camera axes, of unit length: [H, W, 3].

    Unit length, so that depths are distances from the eye: these do not change while the camera only turns.
    """
    focal = focal_length(height, vertical_fov_degrees)
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5 - width / 2) / focal
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5 - height / 2) / focal
    y, x = torch.meshgrid(y, x, indexing="ij")
    return F.normalize(torch.stack([x, y, torch.ones_like(x)], -1), dim=-1)


def project(points: Tensor, height: int, width: int, vertical_fov_degrees: float) -> tuple[Tensor, Tensor]:
    """Points or directions in camera axes [..., 3] -> their places in the picture [..., 2] and [...] bool.

    Places are grid_sample's (align_corners=False): -1 and +1 are the picture's edges. The mask is True for
    what is in front of the camera and inside the picture; places behind the camera are finite, no more.
    """
    focal = focal_length(height, vertical_fov_degrees)
    z = points[..., 2].clamp(min=NEAREST)
    grid = torch.stack(
        [points[..., 0] / z * (2 * focal / width), points[..., 1] / z * (2 * focal / height)], -1
    )
    return grid, (points[..., 2] > NEAREST) & (grid.abs() <= 1).all(-1)


def position(pose: Tensor) -> Tensor:
    """Pose [..., 5] -> where the eye is in this module's world axes [..., 3], metres."""
    return pose[..., :3] * pose.new_tensor([-1.0, -1.0, 1.0])


def reproject(
    pose_from: Tensor,
    pose_to: Tensor,
    inverse_distance: Tensor | float,
    height: int,
    width: int,
    vertical_fov_degrees: float,
) -> tuple[Tensor, Tensor]:
    """Where each pixel of the picture at `pose_to` [B, 5] lies in the picture at `pose_from` [B, 5].

    `inverse_distance` (1/m, anything that broadcasts to [B, H, W]) is that of what `pose_to` sees, along rays
    of unit length; 0 is infinitely far away, where only the rotation counts. Returns the sampling grid
    [B, H, W, 2] for `warp` and the mask [B, H, W] of pixels that `pose_from` sees.

    The point at distance t along a ray d lies at c_to + t R_to d in the world. Divided by t, which does not
    change its place in the picture, it is R_from^T (R_to d + (c_to - c_from) / t) to `pose_from`.
    """
    directions, moved, tilt = _seen_from(pose_from, pose_to, height, width, vertical_fov_degrees)
    inverse = torch.as_tensor(inverse_distance, device=pose_to.device, dtype=pose_to.dtype)
    world = directions + inverse.expand(len(pose_to), height, width)[..., None] * moved[:, None, None]
    return project(world @ tilt, height, width, vertical_fov_degrees)


def _seen_from(
    pose_from: Tensor, pose_to: Tensor, height: int, width: int, vertical_fov_degrees: float
) -> tuple[Tensor, Tensor, Tensor]:
    """In level axes that look where `pose_from` looks: the rays of the picture at `pose_to` [B, H, W, 3], how
    far `pose_to` lies from `pose_from` [B, 3] in metres, and the tilt of `pose_from` [B, 3, 3] (row vectors
    times it are in camera axes)."""
    turn = pose_to[:, 3] - pose_from[:, 3]
    to_level = rotation(turn, pose_to[:, 4])  # [B, 3, 3]
    zero = torch.zeros_like(turn)
    moved = torch.einsum("bij,bi->bj", rotation(pose_from[:, 3], zero), position(pose_to - pose_from))
    directions = rays(height, width, vertical_fov_degrees, pose_to.device, pose_to.dtype)
    level = (directions.view(1, -1, 3) @ to_level.mT).view(-1, height, width, 3)
    return level, moved, rotation(zero, pose_from[:, 4])[:, None]


def carry_inverse_distance(
    inverse: Tensor,
    pose_from: Tensor,
    pose_to: Tensor,
    guess: Tensor,
    vertical_fov_degrees: float,
    rounds: int = 2,
) -> Tensor:
    """The inverse distances [B, H, W] (1/m) of the picture at `pose_from`, as the picture at `pose_to` has
    them. `guess` [B, H, W] stands where the search begins.

    Which pixel of the old picture shows what a pixel of the new one shows depends on the very distance that
    is sought, so the two are found in turn, `rounds` times (fixed-point iteration). Where the old picture
    does not reach, its border is continued. Gradients reach `inverse` through the last reading alone.
    """
    height, width = inverse.shape[-2:]
    directions, moved, tilt = _seen_from(pose_from, pose_to, height, width, vertical_fov_degrees)
    moved = moved[:, None, None]
    found = guess
    for _ in range(rounds):
        level = directions + found.detach()[..., None] * moved
        grid, _ = project(level @ tilt, height, width, vertical_fov_degrees)
        there = warp(inverse[:, None], grid)[:, 0]
        # The point lies 1/there along the old ray; from the new eye it is that far less what was moved.
        point = F.normalize(level, dim=-1) - there[..., None] * moved
        found = there / point.norm(dim=-1).clamp(min=NEAREST)
    return found


def ground_plane(
    pose_to: Tensor,
    height: int,
    width: int,
    vertical_fov_degrees: float,
    eye_height: float,
    far: float,
) -> Tensor:
    """Inverse distances [B, H, W] in 1/m of a flat ground `eye_height` metres below the eye at `pose_to`.

    A ray of unit length that falls by s metres a metre meets the ground at the distance eye_height / s, so
    the inverse is s / eye_height; 1 / far for what is farther or above the horizon.
    """
    pitch = pose_to[:, 4]
    down = rotation(torch.zeros_like(pitch), pitch)[:, 1]  # [B, 3]: the world's y of a camera ray
    directions = rays(height, width, vertical_fov_degrees, pose_to.device, pose_to.dtype)
    return (torch.einsum("bj,hwj->bhw", down, directions) / eye_height).clamp(min=1 / far)


def comes_into_view(
    pose_from: Tensor, pose_to: Tensor, height: int, width: int, vertical_fov_degrees: float
) -> Tensor:
    """[B, H, W] bool: cells of the view at `pose_to` [B, 5] that show what the one at `pose_from` does not,
    over a flat ground. None where a pose is not known."""
    pose_to = torch.cat([pose_to[:, :3] - pose_from[:, :3], pose_to[:, 3:]], 1)
    pose_from = torch.cat([torch.zeros_like(pose_from[:, :3]), pose_from[:, 3:]], 1)
    ground = ground_plane(pose_to, height, width, vertical_fov_degrees, EYE_HEIGHT, FAR)
    _, seen = reproject(pose_from, pose_to, ground, height, width, vertical_fov_degrees)
    known = pose_from.isfinite().all(1) & pose_to.isfinite().all(1)
    return ~seen & known[:, None, None]


def identity_grid(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """The places of the pixels' own centres: [2, H, W], x then y, -1 and +1 being the picture's edges."""
    x = (2 * torch.arange(width, device=device) + 1) / width - 1
    y = (2 * torch.arange(height, device=device) + 1) / height - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))


def warp(pictures: Tensor, grid: Tensor) -> Tensor:
    """Reads pictures [B, C, H, W] at the places of a grid [B, H', W', 2] -> [B, C, H', W'].

    Bilinear; a place outside takes the nearest pixel at the border (zeros there would be painted as black).
    """
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
