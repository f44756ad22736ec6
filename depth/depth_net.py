"""The depth network: a 128x72 picture to the inverse ray distances of a 64x36 grid.

A U-Net (Ronneberger et al., arXiv 1505.04597) with four levels; self-attention at the coarsest lets each
position see the whole picture. It predicts the logarithm of the inverse ray distance, as a correction of that
of a flat ground, and how large its own error is. The pitch of the camera gives the ground where it is known.

Ray distance: metres from the eye along a pixel's ray (geometry/camera.py).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from geometry import camera

STRIDE = 2  # pixels of the picture per position of the output, to each side
OUTPUT_SCALE = 0.1  # standard deviation of the untrained output layer's weights, relative to its default


@dataclass(frozen=True)
class DepthConfig:
    """Sizes of the network. `height` and `width` are those of the picture, in pixels."""

    height: int = 72
    width: int = 128
    channels: tuple[int, ...] = (24, 48, 96, 128)  # of the levels, 36x64 to 5x8
    blocks: tuple[int, ...] = (0, 1, 1, 1)  # residual blocks of each level of the encoder
    heads: int = 4  # of the attention
    dropout: float = 0.1  # of whole channels at the coarsest level, in training
    vertical_fov_degrees: float = 70.0
    farthest_m: float = 100.0  # ray distance of the sky; what is farther counts as so far

    def __post_init__(self):
        # A checkpoint holds a list or a tuple.
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if len(self.blocks) != len(self.channels):
            raise ValueError(f"channels of {len(self.channels)} levels, blocks of {len(self.blocks)}")
        if self.height % STRIDE or self.width % STRIDE:
            raise ValueError(f"picture size {self.width}x{self.height}: sides must be divisible by {STRIDE}")
        if self.channels[-1] % self.heads:
            raise ValueError(f"{self.channels[-1]} channels cannot be split over {self.heads} heads")

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of the output."""
        return self.height // STRIDE, self.width // STRIDE


class ResidualBlock(nn.Module):
    """x + conv3x3(relu(conv3x3(relu(x)))); the second convolution starts at zero, so no norm is needed."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class Attention(nn.Module):
    """Self-attention over all positions of a small grid, with a residual connection (arXiv 1706.03762)."""

    def __init__(self, channels: int, heads: int, grid: tuple[int, int]):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.where = nn.Parameter(torch.zeros(grid[0] * grid[1], channels))  # learnt position embedding
        self.inputs = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        rows = x.flatten(2).transpose(1, 2)  # [B, N, C]
        parts = self.inputs(self.norm(rows) + self.where).view(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # [B, heads, N, C / heads] each
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        return x + self.output(found).transpose(1, 2).reshape(B, C, H, W)


class DepthNet(nn.Module):
    """Pictures [B, 3, Hp, Wp] RGB in [0, 1] -> log inverse ray distances [B, H, W] and their expected errors.

    H = Hp / 2, W = Wp / 2.
    """

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.config = config
        c, levels = config.channels, len(config.channels)
        self.stem = nn.Conv2d(3 * STRIDE**2 + 2, c[0], 3, padding=1)
        self.encoder = nn.ModuleList()
        grid = config.size
        for i in range(levels):
            blocks = [ResidualBlock(c[i]) for _ in range(config.blocks[i])]
            if i:
                grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
                blocks.insert(0, nn.Conv2d(c[i - 1], c[i], 3, stride=2, padding=1))
            self.encoder.append(nn.Sequential(*blocks))
        self.coarsest = nn.Sequential(
            Attention(c[-1], config.heads, grid), ResidualBlock(c[-1]), nn.Dropout2d(config.dropout)
        )
        self.up = nn.ModuleList(nn.Conv2d(c[i + 1], c[i], 1) for i in range(levels - 1))
        self.decoder = nn.ModuleList(ResidualBlock(c[i]) for i in range(levels - 1))
        self.output = nn.Conv2d(c[0], 2, 3, padding=1)
        with torch.no_grad():
            self.output.weight.mul_(OUTPUT_SCALE)
        self.to(memory_format=torch.channels_last)

    def freeze_coarse(self, levels: int) -> None:
        """The `levels` coarsest levels, and what leads up from them, are no longer trained."""
        first = len(self.config.channels) - levels
        frozen = [*self.encoder[first:], *self.up[max(first - 1, 0) :], *self.decoder[first:]]
        for part in [*frozen, self.coarsest] if levels else []:
            part.requires_grad_(False)

    def ground(self, pitch: Tensor) -> Tensor:
        """Pitch [B] in degrees -> log inverse ray distances of a flat ground [B, H, W]; NaN counts as 0."""
        pose = pitch.new_zeros(len(pitch), 5)
        pose[:, 4] = pitch.nan_to_num(0.0)
        return camera.ground_plane(pose, *self.config.size, self.config.vertical_fov_degrees).log()

    def forward(self, pictures: Tensor, pitch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> log inverse ray distances [B, H, W] in log(1/m), and the logarithms of the absolute errors that
        the network expects of them [B, H, W]; both float32.

        `pitch` [B] is the camera's in degrees, NaN where it is unknown; None: unknown for all. Raises
        ValueError for pictures of another size than the config's.
        """
        want = (3, self.config.height, self.config.width)
        if tuple(pictures.shape[1:]) != want:
            raise ValueError(f"pictures are {list(pictures.shape)}; this network takes [B, *{list(want)}]")
        if pitch is None:
            pitch = pictures.new_full((len(pictures),), torch.nan)
        ground = self.ground(pitch)[:, None]  # [B, 1, H, W]
        known = pitch.isfinite().to(ground.dtype)[:, None, None, None].expand_as(ground)
        pixels = F.pixel_unshuffle(2 * pictures - 1, STRIDE)  # [B, 12, H, W]
        x = torch.cat([pixels, ground / 4, known], 1).contiguous(memory_format=torch.channels_last)
        x, passed = self.stem(x), []
        for level in self.encoder:
            x = level(x)
            passed.append(x)
        x = self.coarsest(x)
        for up, level, skip in zip(
            reversed(self.up), reversed(self.decoder), reversed(passed[:-1]), strict=True
        ):
            x = level(skip + F.interpolate(up(x), skip.shape[-2:], mode="nearest"))
        correction, log_error = self.output(F.relu(x)).float().unbind(1)
        return ground[:, 0] + correction, log_error
