"""The terms of the training loss: pure functions, one value per sample; their weights are passed in.

All but the picture term take log-probabilities [B, H, W, V], so that one log_softmax serves them all, and
targets [B, H, W]. All are means over the cells (never sums over them) and return [B].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vq_vae.tokenizer import Tokenizer


def log_probabilities(logits: Tensor) -> Tensor:
    """Logits [B, V, H, W] in any precision -> log-probabilities [B, H, W, V] float32."""
    return logits.movedim(1, -1).float().log_softmax(-1)


def _cells(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def cross_entropy(log_probs: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Exact cross-entropy in nats with label smoothing (Szegedy et al., arXiv 1512.00567): the target gets
    1 - s + s/V of the mass, each other code s/V."""
    exact = -log_probs.gather(-1, target[..., None])[..., 0]
    if label_smoothing == 0:
        return _cells(exact)
    return _cells((1 - label_smoothing) * exact - label_smoothing * log_probs.mean(-1))


def neighbourhood_loss(log_probs: Tensor, target: Tensor, kernel: int = 3, exact_mix: float = 0.3) -> Tensor:
    """Cross-entropy that forgives a shift: -log of the probability that a cell's code is any of the codes
    that the target has in the kernel x kernel cells around it; mixed with `exact_mix` of the exact one.

    It blurs when it dominates: a cell may answer with any code that is near.
    """
    pad = kernel // 2
    padded = F.pad(target[:, None].float(), (pad, pad, pad, pad), mode="replicate")
    around = F.unfold(padded, kernel).long()  # [B, k*k, H*W]
    around = around.transpose(1, 2).view(*target.shape, kernel * kernel)  # [B, H, W, k*k]
    # A code that stands several times in the window counts once.
    times = (around[..., :, None] == around[..., None, :]).sum(-1)
    near = torch.logsumexp(log_probs.gather(-1, around) - times.log(), -1)
    return exact_mix * cross_entropy(log_probs, target) + (1 - exact_mix) * _cells(-near)


def semantic_loss(log_probs: Tensor, target: Tensor, codebook: Tensor) -> Tensor:
    """Mean squared error between the expected code vector and the target's; codebook [V, D]."""
    expected = log_probs.exp() @ codebook  # [B, H, W, D]
    return _cells((expected - codebook[target]).square().mean(-1))


def entropy_floor_loss(log_probs: Tensor, floor: float) -> Tensor:
    """How far the entropy of each cell (nats) lies below `floor`; 0 above it."""
    return _cells((floor - entropy(log_probs)).clamp_min(0))


def sharpness_loss(log_probs: Tensor) -> Tensor:
    """1 - the probability of the likeliest code: 0 when every cell is certain."""
    return _cells(1 - log_probs.amax(-1).exp())


def temporal_loss(log_probs: Tensor, previous: Tensor) -> Tensor:
    """KL(previous || this) in nats a cell: how far the prediction moved since the step before, which gets no
    gradient. The mean over cells, not `batchmean`, which would be H*W times as large."""
    previous = previous.detach()
    return _cells((previous.exp() * (previous - log_probs)).sum(-1))


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of each cell in nats: [B, H, W, V] -> [B, H, W]."""
    return -(log_probs.exp() * log_probs).sum(-1)


def straight_through_pictures(log_probs: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Decoded pictures [B, 3, Hp, Wp] of the likeliest codes, with the gradient of the expected code vector.

    Hard forward, soft backward (Bengio et al., arXiv 1308.3432): a soft mixture of code vectors would put the
    decoder out of its distribution.
    """
    codebook = tokenizer.codebook
    hard = codebook[log_probs.argmax(-1)]
    soft = log_probs.exp() @ codebook
    return tokenizer.decode_vectors((soft + (hard - soft).detach()).permute(0, 3, 1, 2))


def perceptual_loss(log_probs: Tensor, target: Tensor, tokenizer: Tokenizer, distance: nn.Module) -> Tensor:
    """Perceptual distance of the straight-through decoded pictures to the decoded targets."""
    with torch.no_grad():
        truth = tokenizer.vqvae.decode_code(target)
    return distance(straight_through_pictures(log_probs, tokenizer), truth)
