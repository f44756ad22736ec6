"""Motion: how far the player moves in a step, and the pose after it.

Displacements are [right, up, forward] in metres, relative to the yaw after the step.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

METRES_PER_UNIT = 0.25  # displacement at a key action of 1 before training: 4 m/s at 16 frames/s
REST_METRES = 0.01  # a displacement below this counts as standing still
SCENE_CHANNELS, SCENE_GRID = 8, (5, 8)  # of the scene features that the collision head reads


@dataclass
class Motion:
    """A predicted displacement."""

    displacement: Tensor  # [B, 3] metres, if the player moves
    rest_logit: Tensor  # [B] logit that the player stands still

    @property
    def mode(self) -> Tensor:
        """[B, 3] metres; exactly 0 where standing still is likelier, so that the picture does not drift."""
        return self.displacement.masked_fill(self.rest_logit[:, None] > 0, 0.0)


class MotionModel(nn.Module):
    """Predicts the displacement of a step from the action, past displacements and the scene.

    `motion_gru` and `motion_head` are trained beforehand on actions and poses alone
    (training/motion_pretraining.py). `collision_head` scales the displacement by what the scene shows.
    """

    def __init__(self, action_dim: int, state_dim: int, scene_channels: int):
        super().__init__()
        self.scene_proj = nn.Conv2d(scene_channels, SCENE_CHANNELS, 1)
        features = SCENE_CHANNELS * SCENE_GRID[0] * SCENE_GRID[1]
        self.collision_head = nn.Sequential(nn.Linear(action_dim + features, 64), nn.SiLU(), nn.Linear(64, 3))
        self.motion_gru = nn.GRUCell(action_dim + 3, state_dim)
        self.motion_head = nn.Linear(state_dim, 4)  # displacement, logit of rest
        for last in (self.motion_head, self.collision_head[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self,
        actions: Tensor,
        keys: Tensor,
        displacement: Tensor,
        state: Tensor,
        scene: Tensor | None = None,
    ) -> tuple[Motion, Tensor]:
        """-> the displacement of this step and the new motion state [B, state_dim].

        actions [B, A]; keys [B, 3]: what the keys ask for to the right, up and forward, each in -1..1;
        displacement [B, 3] of the step before; scene [B, C, h, w]: the coarsest recurrent state, or None.
        """
        # Batches with pictures are small. Their gradient would undo what was learnt from large ones.
        with torch.set_grad_enabled(torch.is_grad_enabled() and scene is None):
            state = self.motion_gru(torch.cat([actions, displacement / METRES_PER_UNIT], 1), state)
            change, rest = self.motion_head(state).split([3, 1], 1)
        free, passable = METRES_PER_UNIT * (keys + change).float(), 1.0
        if scene is not None:
            around = F.adaptive_avg_pool2d(self.scene_proj(scene), SCENE_GRID).flatten(1)
            passable = 2 * torch.sigmoid(self.collision_head(torch.cat([actions, around], 1)).float())
        return Motion(free * passable, rest[:, 0].float()), state


def next_pose(pose: Tensor, turn: Tensor, displacement: Tensor) -> Tensor:
    """The pose after a step [B, 5]: pose [B, 5], turn [B, 2] (yaw, pitch; degrees), displacement [B, 3].

    The pitch is limited to +-90 degrees.
    """
    yaw = pose[:, 3] + turn[:, 0]
    pitch = (pose[:, 4] + turn[:, 1]).clamp(-90, 90)
    sin, cos = torch.deg2rad(yaw).sin(), torch.deg2rad(yaw).cos()
    right, up, forward = displacement.unbind(1)
    step = torch.stack([-cos * right - sin * forward, up, -sin * right + cos * forward], 1)
    return torch.cat([pose[:, :3] + step, yaw[:, None], pitch[:, None]], 1)


def displacement_between(pose: Tensor, following: Tensor) -> Tensor:
    """The displacement [B, 3] from a pose [B, 5] to the following one [B, 5]: the inverse of `next_pose`."""
    step = (following - pose)[:, :3]
    sin, cos = torch.deg2rad(following[:, 3]).sin(), torch.deg2rad(following[:, 3]).cos()
    return torch.stack(
        [-cos * step[:, 0] - sin * step[:, 2], step[:, 1], -sin * step[:, 0] + cos * step[:, 2]], 1
    )
