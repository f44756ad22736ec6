"""Known physics of a walking player: keys, gravity, and a box against nodes.

In NumPy: nothing is learned here, and one player's step is some hundred operations on a few numbers each,
several times as fast as in torch.

The player is an upright box. In each substep it accelerates towards the speed that the keys ask for, falls,
and moves along the vertical and then along each horizontal axis as far as the nodes let it; a horizontal
obstacle that is no higher than a step is climbed. These are the rules of Luanti 5.6 (`localplayer.cpp`,
`collision.cpp`) and, but for constants, Minecraft's. All positions are those of the feet, in metres, in
Minecraft's axes (y up).
"""

from dataclasses import dataclass, fields

import numpy as np

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

    def as_list(self) -> list[float]:
        """The values in the order of the fields; `MotionConstants(*values)` is the inverse."""
        return [float(getattr(self, f.name)) for f in fields(self)]


@dataclass
class Body:
    """B players."""

    feet: np.ndarray  # [B, 3] metres
    velocity: np.ndarray  # [B, 3] metres per second
    standing: np.ndarray  # [B] bool


@dataclass
class Nodes:
    """The nodes that may block B players."""

    top: np.ndarray  # [B, X, Y, Z] filled height of each node, 0 (free) to 1 metre
    lowest: np.ndarray  # [B, 3] metres, the lowest corner of the box of nodes


def accelerate(
    velocity: np.ndarray, wanted: np.ndarray, acceleration: np.ndarray, seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Displacement and velocity [B, 2] after accelerating from `velocity` to `wanted` [B, 2], at most by
    `acceleration` [B]."""
    change = wanted - velocity
    needed = np.hypot(change[:, 0], change[:, 1]) / acceleration  # seconds
    share = np.minimum(seconds / np.maximum(needed, 1e-9), 1)[:, None]
    after = velocity + change * share
    # It accelerates for min(needed, seconds) and keeps its speed for the rest.
    return seconds * after - np.minimum(needed, seconds)[:, None] / 2 * change * share, after


def sweep(
    wanted: np.ndarray, low: np.ndarray, high: np.ndarray, node_low: np.ndarray, node_high: np.ndarray
) -> np.ndarray:
    """How far a box can move along an axis: [B], of the wanted displacement [B].

    low, high [B]: the box; node_low, node_high [B, N]: nodes in its way, +inf and -inf where there is none.
    """
    ahead = node_low - high[:, None]
    ahead = np.maximum(np.where(ahead >= -INSIDE, ahead, np.inf).min(1), 0)
    back = node_high - low[:, None]
    back = np.minimum(np.where(back <= INSIDE, back, -np.inf).max(1), 0)
    return np.where(wanted > 0, np.minimum(wanted, ahead), np.maximum(wanted, back))


def advance(body: Body, wanted: np.ndarray, jump: np.ndarray, nodes: Nodes, c: MotionConstants) -> Body:
    """One frame: wanted horizontal velocity [B, 2] (x, z), jump key [B] bool. Changes nothing in place.

    A node that the player is well inside of does not block, so that a wrong map holds nobody.
    """
    feet, velocity, standing = body.feet.copy(), body.velocity.copy(), body.standing
    seconds = c.frame_seconds / SUBSTEPS
    edge = [nodes.lowest[:, a, None] + np.arange(n) for a, n in enumerate(nodes.top.shape[1:])]
    floor = np.broadcast_to(edge[1][:, None, :, None], nodes.top.shape)

    def across(axis: int, overlap: float = TOUCH) -> np.ndarray:
        """[B, X or Z] bool: nodes whose extent on a horizontal axis overlaps the box by more than that."""
        at, reach = feet[:, axis, None], c.half_width - overlap
        return (edge[axis] < at + reach) & (edge[axis] + 1 > at - reach)

    def column(overlap: float = TOUCH) -> np.ndarray:
        """[B, X, 1, Z] bool: nodes above, beside or below the box."""
        return across(0, overlap)[:, :, None, None] & across(2, overlap)[:, None, None, :]

    def over(height: np.ndarray) -> np.ndarray:
        """[B] -> [B, 1, 1, 1]"""
        return height[:, None, None, None]

    solid = nodes.top > 0
    inside = column(INSIDE) & (floor < over(feet[:, 1] + c.height - INSIDE))
    solid &= ~(inside & (floor + nodes.top > over(feet[:, 1] + c.step_height)))
    top = np.where(solid, floor + nodes.top, -np.inf)
    floor = np.where(solid, floor, np.inf)
    for _ in range(SUBSTEPS):
        jumping = jump & standing
        velocity[:, 1] = np.where(jumping, c.jump_speed, velocity[:, 1])
        limit = np.where(standing & ~jumping, c.ground_acceleration, c.air_acceleration)
        step, velocity[:, ::2] = accelerate(velocity[:, ::2], wanted, limit, seconds)
        rise = seconds * (velocity[:, 1] - c.gravity * seconds / 2)
        climb = np.where(standing, c.step_height, c.air_step_height)
        here = column()
        under = np.where(here, floor, np.inf).min((1, 3))
        above = np.where(here, top, -np.inf).max((1, 3))
        moved = sweep(rise, feet[:, 1], feet[:, 1] + c.height, under, above)
        stopped = np.abs(moved - rise) > 1e-6
        standing = stopped & (rise < 0)
        velocity[:, 1] = np.where(stopped, 0.0, velocity[:, 1] - c.gravity * seconds)
        feet[:, 1] += moved
        beside = (top > over(feet[:, 1] + climb + TOUCH)) & (floor < over(feet[:, 1] + c.height - TOUCH))
        beside = beside.any(2)  # [B, X, Z]
        for axis, wanted_step in ((0, step[:, 0]), (2, step[:, 1])):
            blocked = (
                (beside & across(2)[:, None]).any(2) if axis == 0 else (beside & across(0)[..., None]).any(1)
            )
            low, high = np.where(blocked, edge[axis], np.inf), np.where(blocked, edge[axis] + 1, -np.inf)
            at = feet[:, axis]
            moved = sweep(wanted_step, at - c.half_width, at + c.half_width, low, high)
            velocity[:, axis] = np.where(np.abs(moved - wanted_step) > 1e-6, 0.0, velocity[:, axis])
            feet[:, axis] += moved
        height = over(feet[:, 1] + TOUCH)
        ledge = np.where(column() & (top > height) & (top <= height + over(climb)), top, -np.inf)
        ledge = ledge.reshape(len(feet), -1).max(1)
        climbed = ledge > feet[:, 1]
        feet[:, 1] = np.where(climbed, ledge, feet[:, 1])
        velocity[:, 1] = np.where(climbed, np.maximum(velocity[:, 1], 0), velocity[:, 1])
        standing = standing | climbed
    return Body(feet, velocity, standing)
