"""The state of a running world: recurrent state, pose, and keyframes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geometry.keyframes import Keyframes
from geometry.motion import displacement_between


@dataclass
class WorldState:
    """The state of B worlds before a frame's tokens are given; all in that frame's coordinates."""

    hidden: list[Tensor]  # of each level [B, C, h, w]
    pose: Tensor  # [B, 5] x, y, z (metres), yaw, pitch (degrees) of the frame
    previous_pose: Tensor  # [B, 5] of the frame before it; NaN at the start
    displacement: Tensor  # [B, 3] metres to the right, up and forward in the last step
    motion: Tensor  # [B, S] state of the motion model
    keyframes: Keyframes
    resolution: Tensor  # [B, H, W] of this frame if it is generated, as in `SourceFrames`
    keyframe_due: Tensor  # [B] bool: if this frame is generated it becomes a keyframe

    @classmethod
    def empty(
        cls,
        batch: int,
        levels: list[int],
        latent: tuple[int, int],
        picture: tuple[int, int],
        motion: Tensor,
        keyframes: int,
        device: torch.device | None = None,
    ) -> "WorldState":
        """A state without observations, the camera level at the origin.

        `levels` are the channels of each recurrent level, each half as high and wide as the one before;
        `latent` and `picture` are (height, width); `motion` [B, S] is the motion model's initial state;
        `keyframes` is the capacity of the memory.
        """
        sizes = [latent]
        for _ in levels[1:]:
            sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
        pose = torch.zeros(batch, 5, device=device)
        return cls(
            hidden=[
                torch.zeros(batch, c, *size, device=device) for c, size in zip(levels, sizes, strict=True)
            ],
            pose=pose,
            previous_pose=torch.full_like(pose, torch.nan),
            displacement=torch.zeros(batch, 3, device=device),
            motion=motion,
            keyframes=Keyframes.empty(batch, keyframes, picture, latent, device),
            resolution=torch.ones(batch, *latent, device=device),
            keyframe_due=torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def __getitem__(self, index: slice | Tensor) -> "WorldState":
        """Some of the worlds."""
        return WorldState(
            [h[index] for h in self.hidden],
            *(x[index] for x in (self.pose, self.previous_pose, self.displacement, self.motion)),
            self.keyframes[index],
            self.resolution[index],
            self.keyframe_due[index],
        )

    def with_true_pose(self, pose: Tensor | None) -> "WorldState":
        """The state with the frame's true pose [B, 5] and displacement, where they are known (not NaN)."""
        if pose is None:
            return self
        pose = torch.where(pose.isfinite(), pose, self.pose)
        displacement = displacement_between(self.previous_pose, pose)
        known = displacement.isfinite()
        return replace(self, pose=pose, displacement=torch.where(known, displacement, self.displacement))
