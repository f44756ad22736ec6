"""Keeps the codes of a rollout as frequent as in the recorded frames that it starts from.

Each sampled code becomes part of the view that the next ones are sampled from, so a small error in how
frequent codes are grows: within half a minute snow turns to grass, and grass to a dark forest. A feedback
corrects it. The frequencies of the codes over the last second are compared with the recorded ones, and the
logits are shifted by the log of their ratio: logit adjustment (Menon et al., arXiv 2007.07314), with the
recorded frequencies as the prior that is wanted and those of the rollout as the one that is found.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FRAMES = 16  # time constant of the exponential mean over the rollout's frames
NEIGHBOURS = (
    8  # similar codes share their frequency: a code's weight falls to exp(-2) at about the 8th nearest
)
EVEN_SHARE = 0.02  # of the frequencies is spread evenly over all codes
MAX_SHIFT = 4.0  # of a logit


@dataclass(frozen=True)
class CodeBalance:
    """The frequencies of the codes in B worlds. Values; nothing is changed in place."""

    recorded: Tensor  # [B, V] share of each code in the recorded frames
    generated: Tensor  # [B, V] the same over the last frames of the rollout; at the start the recorded one
    similar: Tensor  # [V, V] how each code's frequency is shared with similar ones; rows sum to 1

    @classmethod
    def of_recorded(cls, tokens: Tensor, codebook: Tensor) -> "CodeBalance":
        """The balance at the end of recorded frames [B, T, H, W]; codebook [V, D]."""
        similar = similarity(codebook)
        recorded = frequencies(tokens, len(codebook)) @ similar
        return cls(recorded, recorded, similar)

    def after(self, tokens: Tensor) -> "CodeBalance":
        """The balance after one more frame [B, H, W] of the rollout."""
        newest = frequencies(tokens, len(self.similar)) @ self.similar
        return replace(self, generated=self.generated + (newest - self.generated) / FRAMES)

    def shift(self) -> Tensor:
        """What to add to the logits of sampled cells, [B, V]; 0 at the start."""
        even = EVEN_SHARE / len(self.similar)
        return ((self.recorded + even) / (self.generated + even)).log().clamp(-MAX_SHIFT, MAX_SHIFT)


def frequencies(tokens: Tensor, codes: int) -> Tensor:
    """The share of each code in each world: tokens [B, ...] -> [B, V] float32."""
    flat = tokens.flatten(1)
    counts = torch.zeros(len(flat), codes, device=tokens.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype)) / flat.shape[1]


def similarity(codebook: Tensor) -> Tensor:
    """How a code's frequency is shared with similar codes: [V, D] -> [V, V], rows sum to 1."""
    squared = torch.cdist(codebook.float(), codebook.float()).square()
    nearest = min(NEIGHBOURS + 1, len(codebook))  # a code is its own nearest one
    scale = squared.kthvalue(nearest, dim=1).values.median()
    return torch.softmax(-2 * squared / scale.clamp(min=1e-12), 1)
