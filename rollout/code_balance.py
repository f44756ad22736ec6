"""Keeps the codes of a rollout as frequent as in the recorded frames that it starts from.

Each sampled code becomes part of the view that the next ones are sampled from, so a small error in how
frequent codes are grows: within half a minute snow turns to grass, and grass to a dark forest. A feedback
corrects it. The frequencies of the codes over the last second are compared with the recorded ones, and the
logits are shifted by the log of their ratio: logit adjustment (Menon et al., arXiv 2007.07314), with the
recorded frequencies as the prior that is wanted and those of the rollout as the one that is found.

Frequencies are kept for bands of elevation: ground, horizon and sky. So the sky does not mix with the ground,
and a player who looks up need not find ground there.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geometry import camera

EDGES = (-10.0, 5.0)  # degrees of elevation, between the bands
BANDS = len(EDGES) + 1
FRAMES = 16  # time constant of the exponential mean over the rollout's frames
SELDOM = 20  # cells of a band in a recorded frame; a band with fewer has less than half of its shift
NEIGHBOURS = 8  # similar codes share their frequency: at about the 8th nearest the weight is exp(-2)
EVEN_SHARE = 0.02  # of the frequencies is spread evenly over all codes
MAX_SHIFT = 4.0  # of a logit


@dataclass(frozen=True)
class CodeBalance:
    """The frequencies of the codes in B worlds and E bands. Values; nothing is changed in place."""

    recorded: Tensor  # [B, E, V] share of each code in the recorded cells of a band
    cells: Tensor  # [B, E, 1] cells of a band in a recorded frame, mean
    generated: Tensor  # [B, E, V] shares in the last frames of the rollout; at the start the recorded ones
    similar: Tensor  # [V, V] how each code's frequency is shared with similar ones; rows sum to 1

    @classmethod
    def of_recorded(cls, tokens: Tensor, bands: Tensor, codebook: Tensor) -> "CodeBalance":
        """The balance at the end of recorded frames: tokens and bands [B, T, H, W]; codebook [V, D]."""
        similar = similarity(codebook)
        counts = count_codes(tokens, bands, len(codebook))
        total = counts.sum(2, keepdim=True)
        recorded = counts @ similar / total.clamp(min=1)
        return cls(recorded, total / tokens.shape[1], recorded, similar)

    def after(self, tokens: Tensor, bands: Tensor) -> "CodeBalance":
        """The balance after one more frame of the rollout: tokens and bands [B, H, W].

        What is not seen keeps its frequencies: the mean is one over cells, of as many as FRAMES recorded
        frames show of a band.
        """
        counts = count_codes(tokens, bands, len(self.similar))
        total = counts.sum(2, keepdim=True)
        window = torch.maximum(FRAMES * self.cells.clamp(min=SELDOM), total)
        step = (counts @ self.similar - total * self.generated) / window
        return replace(self, generated=self.generated + step)

    def shift(self, bands: Tensor) -> Tensor:
        """What to add to the logits of sampled cells: bands [B, H, W] -> [B, H, W, V]; 0 at the start."""
        even = EVEN_SHARE / len(self.similar)
        ratio = ((self.recorded + even) / (self.generated + even)).log().clamp(-MAX_SHIFT, MAX_SHIFT)
        by_band = ratio * self.cells / (self.cells + SELDOM)  # [B, E, V]
        worlds = torch.arange(len(bands), device=bands.device)[:, None, None]
        return by_band[worlds, bands]


def elevation_bands(pose: Tensor, height: int, width: int, fov: float) -> Tensor:
    """The band of each cell of a view at `pose` [B, 5], by the elevation of its centre: [B, H, W] int64.

    `fov`: vertical field of view in degrees.
    """
    elevation = camera.elevation(pose[:, 4], height, width, fov)
    return torch.bucketize(elevation, elevation.new_tensor(EDGES))


def count_codes(tokens: Tensor, bands: Tensor, codes: int) -> Tensor:
    """How often each code occurs in each band: tokens and bands [B, ...] -> [B, E, V] float32."""
    index = (bands * codes + tokens).flatten(1)
    counts = torch.zeros(len(index), BANDS * codes, device=tokens.device)
    return counts.scatter_add_(1, index, torch.ones_like(index, dtype=counts.dtype)).view(-1, BANDS, codes)


def similarity(codebook: Tensor) -> Tensor:
    """How a code's frequency is shared with similar codes: [V, D] -> [V, V], rows sum to 1."""
    squared = torch.cdist(codebook.float(), codebook.float()).square()
    nearest = min(NEIGHBOURS + 1, len(codebook))  # a code is its own nearest one
    scale = squared.topk(nearest, largest=False).values[:, -1].median()
    return torch.softmax(-2 * squared / scale.clamp(min=1e-12), 1)
