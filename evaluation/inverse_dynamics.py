"""Reads the action off two pictures in a row: a small network trained on real pairs.

evaluate.py shows it generated pictures and asks what was done between them; what it answers should be what was
commanded. It compares features of both pictures at a quarter of their size over all shifts that a turn can
make (a cost volume), so that it sees where things moved rather than what they are.
"""

import copy
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
from actions import CLASS_NAMES, DEGREES_PER_UNIT, JUMP, MOVE_X, MOVE_Z, action_class, camera_degrees
from data import MANIFEST, ClipEntry, DataError, Manifest, TokenClips, unpack_indices
from device import amp_dtype, autocast
from sampling import to_float
from video import VideoError, header_frames, read_frames, resize

STEPS, PAIRS = 1500, 20_000
BATCH = 64
LR, WARMUP, WEIGHT_DECAY = 2e-3, 50, 0.01
HELD_BACK = 0.1  # share of the clips that training leaves out and is judged on
KEYS = {"move_x": 3, "move_z": 3, "jump": 2}  # how many classes each has
LEFT, NONE, RIGHT = BACK, _, FORWARD = range(3)  # classes of move_x and of move_z
REACH = 0.2  # of the picture's width: the largest shift that is looked for
PARTS = (3, 4)  # rows and columns whose features are kept apart: a step forward moves each its own way


# ---------------------------------------------------------------- the network


@dataclass(frozen=True)
class InverseDynamicsConfig:
    """Sizes of the network. Pictures are `height` x `width`, both divisible by 8.

    `degrees_per_unit` is the turn of an action of 1 in what it was trained on; its answers are in degrees.
    """

    height: int = 72
    width: int = 128
    degrees_per_unit: float = DEGREES_PER_UNIT
    features: int = 32
    hidden: int = 64

    def __post_init__(self):
        if self.height % 8 or self.width % 8 or min(self.height, self.width) < 8:
            raise ValueError(f"pictures of {self.height}x{self.width}: both must be divisible by 8")


class Prediction(NamedTuple):
    """What the network answers for B pairs."""

    camera: Tensor  # [B, 2] degrees of yaw (+right) and pitch (+down)
    move_x: Tensor  # [B, 3] logits: left, none, right
    move_z: Tensor  # [B, 3] logits: back, none, forward
    jump: Tensor  # [B, 2] logits: no, yes


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution, normalised."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def cost_volume(a: Tensor, b: Tensor, reach: int) -> Tensor:
    """How well each cell of `a` fits the cells of `b` up to `reach` away: [B, C, h, w] twice -> [B, K*K, h, w].

    K is 2 * reach + 1. The fit is the mean product of the features; it is 0 beyond the border.
    Dosovitskiy et al., FlowNet, arXiv 1504.06852, section 3.
    """
    batch, channels, height, width = a.shape
    size = 2 * reach + 1
    wide, cells = width + 2 * reach, height * width
    padded = F.pad(b, (reach, reach, reach, reach)).flatten(2)  # [B, C, M], M cells with the border
    fits = torch.bmm(a.flatten(2).transpose(1, 2), padded)  # [B, h*w, M]: every cell with every other
    # Of cell (y, x) the fits with (y, x) + (dy, dx) are wanted: they lie at regular places.
    every = padded.shape[2]
    strides = (cells * every, wide, 1, width * every + wide, every + 1)
    near = fits.as_strided((batch, size, size, height, width), strides)  # of dy, dx, y, x
    return near.reshape(batch, size * size, height, width) / channels


class InverseDynamics(nn.Module):
    """Two pictures in a row -> the action between them."""

    def __init__(self, config: InverseDynamicsConfig):
        super().__init__()
        self.config = config
        features, hidden = config.features, config.hidden
        self.reach = max(2, round(REACH * config.width / 4))
        self.eye = nn.Sequential(
            conv(3, features // 2, stride=2),
            conv(features // 2, features, stride=2),
            nn.Conv2d(features, features, 3, padding=1),
        )
        self.trunk = nn.Sequential(
            conv((2 * self.reach + 1) ** 2 + 2 * features, hidden),
            conv(hidden, hidden, stride=2),
            conv(hidden, hidden),
            nn.AdaptiveAvgPool2d(PARTS),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(hidden * PARTS[0] * PARTS[1], 2 * hidden),
            nn.ReLU(inplace=True),
            nn.Linear(2 * hidden, 2 + sum(KEYS.values())),
        )

    def forward(self, before: Tensor, after: Tensor) -> Prediction:
        """Pictures [B, 3, H, W] in [0, 1], one frame apart, of the config's size."""
        a, b = self.eye(torch.cat([before, after]) * 2 - 1).chunk(2)  # [B, C, H/4, W/4] each
        seen = torch.cat([cost_volume(a, b, self.reach), a, b], 1)
        answers = self.head(self.trunk(seen)).float()
        camera, *keys = answers.split([2, *KEYS.values()], 1)
        return Prediction(camera * self.config.degrees_per_unit, *keys)
