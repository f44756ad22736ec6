"""A clip of a wall whose depth is known exactly, for the tests of warps."""

import numpy as np
import torch

from dataset.surroundings import encode_inverse_ray_distance
from depth.depth_clips import DepthClip
from geometry import camera
from runtime.video import to_uint8

FOV = 70.0
WALL_M = 8.0  # metres to the wall from frame 0


def wall_clip(frames: int = 40) -> DepthClip:
    """A walk of 0.1 m a frame straight towards a wall with stripes, the camera level."""
    rays = camera.rays(72, 128, FOV)
    coarse = camera.rays(36, 64, FOV)
    pictures, codes = [], []
    for k in range(frames):
        left = WALL_M - 0.1 * k
        x, y = (rays[..., i] / rays[..., 2] * left for i in (0, 1))
        colour = torch.stack([torch.sin(3 * x), torch.sin(2 * y), torch.sin(x + y)]) * 0.5 + 0.5
        pictures.append(to_uint8(colour[None])[0].numpy())
        codes.append(encode_inverse_ray_distance((coarse[..., 2] / left).numpy()))
    pose = np.zeros((frames, 5), np.float32)
    pose[:, 2] = 0.1 * np.arange(frames)
    return DepthClip("wall", np.stack(pictures), np.zeros(frames, bool), np.stack(codes), pose)
