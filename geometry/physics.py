"""Known physics of a walking player: keys, gravity, and a box against nodes.

The player is an upright box. In each substep it accelerates towards the speed that the keys ask for, falls,
and moves along the vertical and then along each horizontal axis as far as the nodes let it; a horizontal
obstacle that is no higher than a step is climbed. These are the rules of Luanti 5.6 (`localplayer.cpp`,
`collision.cpp`) and, but for constants, Minecraft's. All positions are those of the feet, in metres, in
Minecraft's axes (y up).
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

SUBSTEPS = 2  # per frame; 4 and 7 (the game's own) are no closer to recordings
TOUCH = 1e-3  # metres: boxes that overlap by less only touch
INSIDE = 0.05  # metres that a box may already be inside a node and still be held back by it


@dataclass(frozen=True)
class MotionConstants:
    """What physics needs to know of a game. Metres and seconds; defaults: Luanti at 16 frames/s."""

    frame_seconds: float = 1 / 16
    walk_speed: float = 3.91
    ground_acceleration: float = 30.0
    air_acceleration: float = 20.0
    gravity: float = 19.62
    jump_speed: float = 6.5
    step_height: float = 0.6  # climbed without a jump while standing
    air_step_height: float = 0.2  # the same in the air
    half_width: float = 0.3  # of the player's box
    height: float = 1.7
    eye_height: float = 1.47
    lattice: float = 0.5  # where a node begins on each axis: 0.5 if it is centred on whole numbers
    low_height: float = 0.125  # of nodes that are not full cubes

    def as_tensor(self) -> Tensor:
        """The values in the order of the fields, for a checkpoint."""
        return torch.tensor([getattr(self, f.name) for f in fields(self)], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> "MotionConstants":
        """The inverse of `as_tensor`."""
        return cls(*values.tolist())


@dataclass
class Body:
    """B players."""

    feet: Tensor  # [B, 3] metres
    velocity: Tensor  # [B, 3] metres per second
    standing: Tensor  # [B] bool


@dataclass
class Nodes:
    """The nodes that may block B players."""

    top: Tensor  # [B, X, Y, Z] filled height of each node, 0 (free) to 1 metre
    lowest: Tensor  # [B, 3] metres, the lowest corner of the box of nodes


def free_fall(body: Body, seconds: float, c: MotionConstants) -> tuple[Tensor, Tensor]:
    """Vertical displacement [B] and velocity [B] after a time without obstacles."""
    velocity = body.velocity[:, 1]
    return seconds * (velocity - c.gravity * seconds / 2), velocity - c.gravity * seconds


def accelerate(
    velocity: Tensor, wanted: Tensor, acceleration: Tensor, seconds: float
) -> tuple[Tensor, Tensor]:
    """Displacement and velocity [B, 2] after accelerating from `velocity` to `wanted` [B, 2], at most by
    `acceleration` [B]."""
    change = wanted - velocity
    needed = change.norm(dim=1, keepdim=True) / acceleration[:, None]  # seconds
    share = (seconds / needed.clamp(min=1e-9)).clamp(max=1)
    after = velocity + change * share
    # It accelerates for min(needed, seconds) and keeps its speed for the rest.
    accelerating = needed.clamp(max=seconds)
    return seconds * after - accelerating / 2 * change * share, after


def sweep(wanted: Tensor, low: Tensor, high: Tensor, node_low: Tensor, node_high: Tensor) -> Tensor:
    """How far a box can move along an axis: [B], of the wanted displacement [B].

    low, high [B]: the box; node_low, node_high [B, N]: nodes in its way, +-inf where there is none.
    """
    ahead = torch.where(node_low >= high[:, None] - INSIDE, node_low - high[:, None], torch.inf).amin(1)
    back = torch.where(node_high <= low[:, None] + INSIDE, node_high - low[:, None], -torch.inf).amax(1)
    return torch.where(
        wanted > 0, torch.minimum(wanted, ahead.clamp(min=0)), torch.maximum(wanted, back.clamp(max=0))
    )


def advance(body: Body, wanted: Tensor, jump: Tensor, nodes: Nodes, c: MotionConstants) -> Body:
    """One frame: wanted horizontal velocity [B, 2] (x, z), jump key [B] bool. No gradient, not in place."""
    B, X, Y, Z = nodes.top.shape
    feet, velocity, standing = body.feet.clone(), body.velocity.clone(), body.standing
    seconds = c.frame_seconds / SUBSTEPS
    solid = nodes.top > 0
    edge = [nodes.lowest[:, a, None] + torch.arange(n, device=feet.device) for a, n in enumerate((X, Y, Z))]
    floor = edge[1][:, None, :, None].expand_as(nodes.top)
    top = torch.where(solid, floor + nodes.top, -torch.inf)

    def across(axis: int) -> Tensor:
        """[B, X, 1, 1] or [B, 1, 1, Z] bool: nodes whose extent on a horizontal axis overlaps the box."""
        a = edge[axis]
        inside = (a < feet[:, axis, None] + c.half_width - TOUCH) & (
            a + 1 > feet[:, axis, None] - c.half_width + TOUCH
        )
        return inside[:, :, None, None] if axis == 0 else inside[:, None, None, :]

    # What the box is inside of cannot be solid: a body is never in a node.
    body_inside = across(0) & across(2) & (floor < feet[:, 1, None, None, None] + c.height - INSIDE)
    body_inside = body_inside & (top > feet[:, 1, None, None, None] + c.step_height)
    solid = solid & ~body_inside
    top = torch.where(solid, top, -torch.inf)
    floor = torch.where(solid, floor, torch.inf)
    for _ in range(SUBSTEPS):
        jumping = jump & standing
        velocity[:, 1] = torch.where(jumping, c.jump_speed, velocity[:, 1])
        limit = torch.where(standing & ~jumping, c.ground_acceleration, c.air_acceleration).to(feet)
        step, velocity[:, ::2] = accelerate(velocity[:, ::2], wanted, limit, seconds)
        rise, velocity[:, 1] = free_fall(Body(feet, velocity, standing), seconds, c)
        climb = torch.where(standing, c.step_height, c.air_step_height)
        column = across(0) & across(2)
        under = torch.where(column, floor, torch.inf).amin((1, 3))
        over = torch.where(column, top, -torch.inf).amax((1, 3))
        moved = sweep(rise, feet[:, 1], feet[:, 1] + c.height, under, over)
        stopped = (moved - rise).abs() > 1e-6
        standing = stopped & (rise < 0)
        velocity[:, 1] = torch.where(stopped, 0.0, velocity[:, 1])
        feet[:, 1] += moved
        beside = (top > (feet[:, 1] + climb + TOUCH)[:, None, None, None]) & (
            floor < (feet[:, 1] + c.height - TOUCH)[:, None, None, None]
        )
        for axis, column in ((0, 0), (2, 1)):
            blocked = (beside & across(2 - axis)).any(2).any(2 if axis == 0 else 1)  # [B, X] or [B, Z]
            low = torch.where(blocked, edge[axis], torch.inf)
            high = torch.where(blocked, edge[axis] + 1, -torch.inf)
            at = feet[:, axis]
            moved = sweep(step[:, column], at - c.half_width, at + c.half_width, low, high)
            velocity[:, axis] = torch.where((moved - step[:, column]).abs() > 1e-6, 0.0, velocity[:, axis])
            feet[:, axis] += moved
        height = feet[:, 1, None, None, None]
        ledge = (
            across(0)
            & across(2)
            & (top > height + TOUCH)
            & (top <= height + climb[:, None, None, None] + TOUCH)
        )
        ledge = torch.where(ledge, top, -torch.inf).flatten(1).amax(1)
        climbed = ledge > feet[:, 1]
        feet[:, 1] = torch.where(climbed, ledge, feet[:, 1])
        velocity[:, 1] = torch.where(climbed, velocity[:, 1].clamp(min=0), velocity[:, 1])
        standing = standing | climbed
    return Body(feet, velocity, standing)
