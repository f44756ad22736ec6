"""Motion: how far the player moves in a step, and the pose after it.

Displacements are [right, up, forward] in metres, relative to the yaw after the step.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from geometry.occupancy import FEATURES, REACH, SIDE, Occupancy, occupancy_around
from geometry.physics import Body, MotionConstants, Nodes, advance

METRES_PER_UNIT = 0.25  # of a step at full speed: the unit in which networks are told displacements


def next_pose(pose: Tensor, turn: Tensor, displacement: Tensor) -> Tensor:
    """The pose after a step [B, 5]: pose [B, 5], turn [B, 2] (yaw, pitch; degrees), displacement [B, 3].

    The pitch is limited to +-90 degrees.
    """
    yaw = pose[:, 3] + turn[:, 0]
    pitch = (pose[:, 4] + turn[:, 1]).clamp(-90, 90)
    return torch.cat([pose[:, :3] + to_world(displacement, yaw), yaw[:, None], pitch[:, None]], 1)


def displacement_between(pose: Tensor, following: Tensor) -> Tensor:
    """The displacement [B, 3] from a pose [B, 5] to the following one [B, 5]: the inverse of `next_pose`."""
    return from_world((following - pose)[:, :3], following[:, 3])


STATE = 9  # velocity 3, expected displacement 3, standing, y where the player last stood, and on a node
CHANNELS = 32  # of the node network
FREE, SOLID, LOW = range(3)  # classes of nodes
RESTING = 1e-3  # metres and metres per second, below which a player without keys does not move
UNEXPECTED = 0.02  # metres: a step that differs by more from the expected one corrects the velocity
# Logits of an untrained network: of ground that is not seen, of the evidence of each point, of a low node.
PRIOR, SEEN, UNLIKELY = 2.0, 1.0, -4.0
GROUND_TOLERANCE = 0.01  # metres: feet so far under a node's border stand on it
# Metres from the eye to a surface straight ahead at its height: nearer, the player does not come. Half the
# player's width and a little more, since the distance is predicted.
CLEARANCE = 0.4
MAX_FALL = 3.0  # metres: 2 % of the recorded falls are deeper
COVERED = 0.05  # metres: feet that stand so far over a node's border stand on a low node


class NodeNetwork(nn.Module):
    """Classifies the nodes around the player from the evidence of depth: free, solid or low.

    Untrained it takes the evidence as it is and, where there is none, everything under the feet as solid.
    """

    def __init__(self):
        super().__init__()
        self.evidence_proj = nn.Conv3d(FEATURES, CHANNELS, 1)
        self.place = nn.Parameter(torch.zeros(1, CHANNELS, SIDE, SIDE, SIDE))
        self.ground_proj = nn.Linear(3, CHANNELS)
        self.block = nn.Sequential(
            nn.SiLU(),
            nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1),
            nn.SiLU(),
            nn.Conv3d(CHANNELS, CHANNELS, 1),
        )
        self.out_proj = nn.Conv3d(CHANNELS, 3, 1)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, evidence: Tensor, ground: Tensor) -> Tensor:
        """Logits [B, 3, X, Y, Z] of FREE, SOLID and LOW.

        evidence [B, FEATURES, X, Y, Z]; ground [B]: metres from the bottom of the box to where the player
        last stood. Its fraction says whether the ground is covered, with snow for example.
        """
        level = (ground + GROUND_TOLERANCE).floor()
        covered = (ground - level).clamp(min=0)
        around = torch.stack([covered, (covered > COVERED).float(), (level - REACH) / REACH], 1)
        x = self.evidence_proj(evidence) + self.place + self.ground_proj(around)[:, :, None, None, None]
        x = x + self.block(x)
        points, seen = evidence.unflatten(1, (2, -1)).unbind(1)
        below = torch.arange(SIDE, device=ground.device) < level[:, None]
        prior = torch.where(below, PRIOR, -PRIOR)[:, None, :, None]
        solid = (SEEN * points * seen).sum(1) + prior * (1 - seen.mean(1))
        fixed = torch.stack([torch.zeros_like(solid), solid, torch.full_like(solid, UNLIKELY)], 1)
        return self.out_proj(F.silu(x)) + fixed


class PlayerMotion(nn.Module):
    """The displacement of a step from the action, the last steps and the nodes around the player.

    Known physics (geometry/physics.py) with the nodes that `node_network` finds in the keyframes' depth. If
    `sees_nodes` is 0, flat ground without obstacles instead: for data without poses, from which neither the
    game's constants nor its nodes can be learned.
    """

    def __init__(self, constants: MotionConstants | None = None):
        super().__init__()
        self.node_network = NodeNetwork()
        values = (constants or MotionConstants()).as_list()
        self.register_buffer("constant_values", torch.tensor(values, dtype=torch.float64))
        self.register_buffer("sees_nodes", torch.ones(()))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: object) -> None:
        """As in nn.Module; older checkpoints have no `sees_nodes`: they all see them."""
        state_dict.setdefault(f"{prefix}sees_nodes", torch.ones(()))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def constants(self) -> MotionConstants:
        """Of the game, as fitted in training; they are part of the checkpoint."""
        return MotionConstants(*self.constant_values.tolist())

    @constants.setter
    def constants(self, constants: MotionConstants) -> None:
        self.constant_values.copy_(torch.tensor(constants.as_list(), dtype=torch.float64))

    def init_state(self, batch: int, device: torch.device | None = None) -> Tensor:
        """State [B, STATE] of players that stand still."""
        state = torch.zeros(batch, STATE, device=device)
        state[:, 6] = 1.0
        return state

    def occupancy_around(
        self, inverse_ray_distance: Tensor, frames: Tensor, valid: Tensor, pose: Tensor, fov: float
    ) -> Occupancy:
        """`occupancy.occupancy_around` with this game's eye height and lattice."""
        c = self.constants
        return occupancy_around(inverse_ray_distance, frames, valid, pose, fov, c.eye_height, c.lattice)

    def filled(self, occupancy: Occupancy, ground: Tensor) -> Tensor:
        """Filled height [B, X, Y, Z] of each node in the box around each player, 0 (free) to 1 metre.

        `ground` [B] as in `NodeNetwork.forward`.
        """
        c = self.constants
        kind = self.node_network(occupancy.evidence, ground).argmax(1)
        low = torch.remainder(ground + GROUND_TOLERANCE, 1.0) - GROUND_TOLERANCE
        low = torch.where((low > COVERED) & (low < c.step_height), low, c.low_height)
        return (kind == SOLID).float() + (kind == LOW) * low[:, None, None, None]

    @torch.no_grad()
    def forward(
        self,
        keys: Tensor,
        turn: Tensor,
        pose: Tensor,
        displacement: Tensor,
        state: Tensor,
        occupancy: Occupancy | None = None,
        ahead: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """-> the displacement [B, 3] of this step and the new state [B, STATE]. Deterministic, no gradient.

        keys [B, 3]: what the keys ask for to the right, up and forward, each in -1..1; turn [B]: of the yaw
        in this step, degrees; pose [B, 5] and displacement [B, 3] of the last step, true or predicted;
        occupancy: what `occupancy_around` returns for this pose, or None if nothing is known; ahead [B]:
        metres to what the camera sees straight ahead (`camera.distance_ahead` at `heading`), or None. A
        player that rests and presses no key stays exactly where it is. No fall ends deeper than MAX_FALL
        below the last node that the player stood on.
        """
        c, feet = self.constants, pose[:, :3].float()
        if occupancy is None or not self.sees_nodes:
            occupancy = Occupancy.unknown(feet, c.lattice)
        velocity, standing = self.observed(to_world(displacement, pose[:, 3]), state, c)
        ground = torch.where(standing, feet[:, 1], state[:, 7])
        # A world may invent a hole whose dark pictures show no bottom. The floor that ends the fall is no
        # node: it stays where it is until the player stands on something else.
        on_floor = (feet[:, 1] - state[:, 8] + MAX_FALL).abs() < GROUND_TOLERANCE
        support = torch.where(standing & ~on_floor, feet[:, 1], state[:, 8])
        right, up, forward = keys.float().unbind(1)
        level = torch.stack([right, torch.zeros_like(up), forward], 1)
        level = level / level.norm(dim=1, keepdim=True).clamp(min=1)
        yaw, jump = pose[:, 3] + turn, up > 0.5
        way = to_world(level, yaw)
        wanted = c.walk_speed * way[:, ::2]
        # NumPy, on the CPU: see physics.py.
        body = Body(*(x.double().cpu().numpy() for x in (feet, velocity)), standing.cpu().numpy())
        nodes = Nodes(
            self.filled(occupancy, ground - occupancy.lowest[:, 1]).cpu().numpy(),
            occupancy.lowest.double().cpu().numpy(),
        )
        after = advance(body, wanted.double().cpu().numpy(), jump.cpu().numpy(), nodes, c)
        moved = torch.from_numpy(after.feet - body.feet).to(feet)
        velocity_after = torch.from_numpy(after.velocity).to(feet)
        if ahead is not None and self.sees_nodes:
            # The map may miss an obstacle that the player already stands in front of, or in.
            way = F.normalize(way, dim=1)
            excess = ((moved * way).sum(1) - (ahead - CLEARANCE).clamp(min=0)).clamp(min=0)
            moved = moved - excess[:, None] * way
            speed = (velocity_after * way).sum(1) * (excess > 0)
            velocity_after = velocity_after - speed[:, None] * way
        floor = support - MAX_FALL - feet[:, 1]
        held = (moved[:, 1] < floor) & (floor <= GROUND_TOLERANCE)
        moved[:, 1] = torch.where(held, floor, moved[:, 1])
        velocity_after[:, 1] = velocity_after[:, 1].masked_fill(held, 0.0)
        landed = torch.from_numpy(after.standing).to(feet.device)
        support = torch.where(landed & ~held, feet[:, 1] + moved[:, 1], support)
        idle = standing & ~jump & (level.abs().amax(1) == 0) & (velocity.abs().amax(1) < RESTING)
        moved = moved.masked_fill(idle[:, None], 0.0)
        velocity = velocity_after.masked_fill(idle[:, None], 0.0)
        standing = landed | held | idle
        state = torch.cat([velocity, moved, torch.stack([standing.float(), ground, support], 1)], 1)
        return from_world(moved, yaw), state

    @staticmethod
    def heading(keys: Tensor, turn: Tensor) -> Tensor:
        """The direction [B] in which `keys` move the player, relative to the yaw before the step, degrees."""
        return torch.rad2deg(torch.atan2(keys[:, 0], keys[:, 2])) + turn

    @staticmethod
    def observed(moved: Tensor, state: Tensor, c: MotionConstants) -> tuple[Tensor, Tensor]:
        """Velocity [B, 3] and whether the player stands [B], before a step.

        Where the last step `moved` [B, 3] (x, y, z) was not the expected one, they are taken from it.
        """
        unexpected = (moved - state[:, 3:6]).abs() > UNEXPECTED
        speed = moved / c.frame_seconds
        falling = speed[:, 1].abs() > RESTING
        # A step's displacement is its mean velocity; gravity has changed it by half a step's since.
        vertical = torch.where(falling, speed[:, 1] - c.gravity * c.frame_seconds / 2, 0.0)
        speed = torch.stack([speed[:, 0], vertical, speed[:, 2]], 1)
        velocity = torch.where(unexpected, speed, state[:, :3])
        return velocity, torch.where(unexpected[:, 1], ~falling, state[:, 6] > 0.5)


def to_world(displacement: Tensor, yaw: Tensor) -> Tensor:
    """[right, up, forward] relative to the yaw [B] (degrees) -> [x, y, z], [B, 3] both."""
    sin, cos = torch.deg2rad(yaw).sin(), torch.deg2rad(yaw).cos()
    right, up, forward = displacement.unbind(1)
    return torch.stack([-cos * right - sin * forward, up, -sin * right + cos * forward], 1)


def from_world(step: Tensor, yaw: Tensor) -> Tensor:
    """The inverse of `to_world`."""
    sin, cos = torch.deg2rad(yaw).sin(), torch.deg2rad(yaw).cos()
    x, y, z = step.unbind(1)
    return torch.stack([-cos * x - sin * z, y, -sin * x + cos * z], 1)
