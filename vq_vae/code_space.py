"""The space in which codes are compared: principal components of the tokenizer's codebook.

For the shipped tokenizer, 24 components separate the codes as well as all 384 dimensions do.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

HEAD_SCALE = 0.3  # root mean square of a head's weights; its input, a GRU state, lies in -1..1


class CodeSpace(nn.Module):
    """Maps tokens and encoder outputs to points of `dim` principal components. Buffers only."""

    def __init__(self, codebook_size: int, embedding_dim: int, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(embedding_dim))  # of the codebook
        self.register_buffer("axes", torch.zeros(min(dim, embedding_dim), embedding_dim))  # components
        self.register_buffer("codes", torch.zeros(codebook_size, dim))  # each code's point [V, d]
        self.register_buffer("spread", torch.ones(dim))  # standard deviation of each component

    @torch.no_grad()
    def fit(self, codebook: Tensor) -> None:
        """Finds the principal components of a codebook [V, E]."""
        codebook = codebook.float()
        self.mean = codebook.mean(0)
        axes = torch.linalg.svd(codebook - self.mean, full_matrices=False)[2][: self.codes.shape[1]]
        self.axes = axes.clone()
        points = (codebook - self.mean) @ self.axes.T
        self.codes.zero_()
        self.codes[:, : points.shape[1]] = points
        spread = self.codes.std(0)
        self.spread.copy_(spread.clamp_min(0.1 * spread.max()))

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [N, H, W] -> points [N, d, H, W]."""
        return self.codes[tokens].movedim(-1, 1)

    def project(self, latents: Tensor) -> Tensor:
        """Encoder outputs [N, E, H, W] -> points [N, d, H, W] float32."""
        with torch.autocast(latents.device.type, enabled=False):
            points = (latents.float().movedim(1, -1) - self.mean) @ self.axes.T
            return F.pad(points, (0, len(self.spread) - len(self.axes))).movedim(-1, 1)

    def normalize(self, points: Tensor) -> Tensor:
        """Points [N, d, H, W] divided by the spread of each component."""
        return points / self.spread[:, None, None]

    def similar_codes(self, count: int) -> Tensor:
        """The `count` nearest other codes of each code: [V, count]."""
        count = min(count + 1, len(self.codes))
        return torch.cdist(self.codes, self.codes).topk(count, largest=False).indices[:, 1:]


@torch.no_grad()
def init_from_codebook(weight: Tensor, codebook: Tensor, scale: float = HEAD_SCALE) -> None:
    """Fills the first columns of a weight [V, C] (or [V, C, 1, 1]) with a codebook's principal components.

    codebook [V, D]. Works in place. The components are weighted by the square root of their singular values
    and scaled to a root mean square of `scale`. Other columns keep their values. Similar codes then start
    with similar weights.
    """
    codebook = codebook.float()
    left, singular, _ = torch.linalg.svd(codebook - codebook.mean(0), full_matrices=False)
    parts = left * singular.sqrt()  # [V, min(V, D)]
    n = min(weight.shape[1], parts.shape[1])
    filled = parts[:, :n] * (scale / parts[:, :n].square().mean().sqrt())
    weight[:, :n] = filled.view(len(filled), n, *[1] * (weight.dim() - 2))
