"""Occupancy: what the depth of earlier frames says about the nodes around the player.

A voxel world is made of nodes, cubes of 1 m. A camera of 70 degrees sees neither what is at the player's feet
nor what is beside the player, so the evidence comes from several keyframes. Each point of the box around the
player is projected into each keyframe and its distance from the camera compared with the depth there: a
point nearer than the depth is free, one just behind it is solid, what lies farther behind is unknown. This
is the projective form of volumetric fusion (Curless and Levoy, A Volumetric Method for Building Complex
Models from Range Images, SIGGRAPH 1996): without a loop over frames or rays, and each keyframe counts alike,
however old it is.

Positions are in Minecraft's axes (y up), in the frame of the poses. Nodes lie on a lattice whose offset is
known because poses are only ever shifted by whole metres (`camera.relative_to_first`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from geometry import camera

REACH = 3  # nodes from the player's feet to the faces of the box, as in the recorded boxes of nodes
SIDE = 2 * REACH + 1
POINTS = 2  # points of a node per axis at which the depth is compared
FRAMES = 16  # keyframes that are fused
PROBE_RADII = (0.8, 2.0)  # metres: keyframes are chosen to show points on circles so far around the player,
PROBE_HEIGHTS = (-0.2, 1.0)  # so high over the feet
PROBES = 8  # points on each circle
HALF_VALUE_METRES = 2.0  # distance at which a view of a probe has half the value of one from beside it
TOLERANCE, TOLERANCE_SHARE = 0.1, 0.05  # metres, and share of the distance, that a depth may be off
THICKNESS = 0.6  # metres: a point so far behind a surface still belongs to it
NEWER = 1e-3  # preference for the newest keyframe among equal ones
FEATURES = 2 * POINTS**3  # channels of `Occupancy.evidence`


@dataclass
class Occupancy:
    """The box of nodes around B players."""

    evidence: Tensor  # [B, FEATURES, X, Y, Z]: of each point -1 free .. 1 solid, then how well it was seen
    lowest: Tensor  # [B, 3] metres, the lowest corner of the box

    def __getitem__(self, index: slice | Tensor) -> "Occupancy":
        """Some of the worlds."""
        return Occupancy(self.evidence[index], self.lowest[index])

    @classmethod
    def unknown(cls, feet: Tensor, lattice: float) -> "Occupancy":
        """Boxes around the feet [B, 3] of which nothing is known."""
        evidence = feet.new_zeros(len(feet), FEATURES, SIDE, SIDE, SIDE)
        return cls(evidence, lowest_corner(feet, lattice))


def lowest_corner(feet: Tensor, lattice: float) -> Tensor:
    """Lowest corner [B, 3] of the box around the feet [B, 3]; its middle node contains them.

    `lattice` (metres) is where a node begins on each axis: 0.5 if nodes are centred on whole numbers.
    """
    raised = feet + feet.new_tensor([0.0, 0.01, 0.0])  # feet that stand on a node are exactly on its border
    return (raised - lattice).floor() + lattice - REACH


def points_of_box(lowest: Tensor) -> Tensor:
    """The points of the boxes at which depths are compared: lowest corners [B, 3] -> [B, N, 3].

    Ordered by node (x, y, z), then by point inside the node.
    """
    nodes = torch.arange(SIDE, device=lowest.device, dtype=lowest.dtype)
    inside = (torch.arange(POINTS, device=lowest.device, dtype=lowest.dtype) + 0.5) / POINTS
    corner = torch.stack(torch.meshgrid(nodes, nodes, nodes, indexing="ij"), -1).view(-1, 1, 3)
    offset = torch.stack(torch.meshgrid(inside, inside, inside, indexing="ij"), -1).view(1, -1, 3)
    return lowest[:, None] + (corner + offset).view(1, -1, 3)


def select_frames(frames: Tensor, valid: Tensor, feet: Tensor, count: int, fov: float) -> Tensor:
    """The keyframes that show most of what is around the players: indices [B, count].

    frames [B, M, 5]: poses of the keyframes, oldest first, with the position of the eye; valid [B, M] bool;
    feet [B, 3] of the players now. Greedy, as `Keyframes.select`: each next keyframe adds most
    to those before it. Fewer valid keyframes than `count`: invalid ones fill up.
    """
    B, M = valid.shape
    angle = torch.arange(PROBES, device=feet.device, dtype=feet.dtype) * (2 * math.pi / PROBES)
    circles = [
        torch.stack([radius * angle.cos(), torch.full_like(angle, height), radius * angle.sin()], 1)
        for radius in PROBE_RADII
        for height in PROBE_HEIGHTS
    ]
    probes = in_camera_axes(feet[:, None] + torch.cat(circles), frames)
    _, inside = camera.project(probes.mT, 9, 16, fov)
    value = inside * valid[..., None] / (1 + probes.norm(dim=2) / HALF_VALUE_METRES)
    newer = NEWER * torch.arange(M, device=feet.device) / M + valid
    best, taken, chosen = value.new_zeros(B, value.shape[-1]), torch.zeros_like(value[..., 0]), []
    for _ in range(min(count, M)):
        gain = (value - best[:, None]).clamp_min(0).sum(-1) + newer - 1e3 * taken
        index = gain.argmax(1, keepdim=True)
        taken = taken.scatter(1, index, 1.0)
        best = torch.maximum(best, value.gather(1, index[..., None].expand(-1, -1, best.shape[-1]))[:, 0])
        chosen.append(index)
    return torch.cat(chosen, 1)


def in_camera_axes(points: Tensor, frames: Tensor) -> Tensor:
    """Points [B, N, 3] seen from the frames [B, K, 5] (position of the eye): [B, K, 3, N] in camera axes."""
    B, K, _ = frames.shape
    sign = points.new_tensor([-1.0, -1.0, 1.0])
    to_camera = camera.rotation(frames[..., 3], frames[..., 4]).mT  # [B, K, 3, 3]
    eye = to_camera @ (frames[..., :3] * sign)[..., None]
    # One product for all frames, and the points last: both are several times faster than the usual order.
    seen = torch.baddbmm(eye.view(B, 3 * K, 1), to_camera.reshape(B, 3 * K, 3), (points * sign).mT, beta=-1)
    return seen.view(B, K, 3, -1)


def occupancy_around(
    inverse_ray_distance: Tensor,
    frames: Tensor,
    valid: Tensor,
    pose: Tensor,
    fov: float,
    eye_height: float,
    lattice: float,
    count: int = FRAMES,
) -> Occupancy:
    """The evidence of keyframes about the nodes around the players. No gradient.

    inverse_ray_distance [B, M, h, w] in 1/m; frames [B, M, 5] their poses, oldest first; valid [B, M] bool;
    pose [B, 5] of the players now. Positions of poses are those of the feet, `eye_height` metres below the
    eye. `fov` is the vertical field of view in degrees, `count` the number of keyframes that are fused.
    """
    with torch.no_grad():
        feet = pose[:, :3]
        lowest = lowest_corner(feet, lattice)
        raise_eye = feet.new_tensor([0.0, eye_height, 0.0, 0.0, 0.0])
        frames = torch.where(valid[..., None], frames + raise_eye, 0.0)
        if count < valid.shape[1]:
            chosen = select_frames(frames, valid, feet, count, fov)
            rows = torch.arange(len(chosen), device=chosen.device)[:, None]
            inverse_ray_distance = inverse_ray_distance[rows, chosen]
            frames, valid = frames[rows, chosen], valid[rows, chosen]
        return Occupancy(fuse(inverse_ray_distance, frames, valid, lowest, fov), lowest)


def fuse(inverse: Tensor, frames: Tensor, valid: Tensor, lowest: Tensor, fov: float) -> Tensor:
    """Evidence [B, FEATURES, X, Y, Z] of the boxes at `lowest` [B, 3], see `occupancy_around`.

    inverse [B, K, h, w] of the chosen keyframes, which see a point with the weight 1 / (1 + distance)^2.
    """
    B, K, h, w = inverse.shape
    x, y, z = in_camera_axes(points_of_box(lowest), frames).unbind(2)  # [B, K, N] each
    distance = (x * x).addcmul_(y, y).addcmul_(z, z).sqrt_()
    scale = camera.focal_length(h, fov) / z.clamp(min=camera.NEAREST)
    column, row = x.mul(scale).add_(w / 2), y.mul(scale).add_(h / 2)
    seen = (z > camera.NEAREST) & (column >= 0) & (column < w) & (row >= 0) & (row < h) & valid[..., None]
    pixel = row.clamp_(0, h - 1).floor_().mul_(w).add_(column.clamp_(0, w - 1)).long()
    depth = inverse.flatten(2).gather(2, pixel).clamp_(min=1 / camera.FAR_RAY_DISTANCE).reciprocal_()
    weight = (1 + distance).square_().reciprocal_() * seen
    behind = distance - depth
    in_front = behind < distance.mul(-TOLERANCE_SHARE).sub_(TOLERANCE)
    free = (weight * in_front).sum(1)
    total = (weight * (behind < THICKNESS)).sum(1)  # [B, N]
    evidence = torch.stack([(total - 2 * free) / (total + 1e-3), total / (total + 0.1)], 1)
    evidence = evidence.view(B, 2, SIDE, SIDE, SIDE, POINTS**3)
    return evidence.movedim(-1, 2).flatten(1, 2)
