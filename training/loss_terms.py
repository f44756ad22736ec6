"""The terms of the training loss, unweighted: pure functions with one value per sample.

They take log-probabilities [B, H, W, V], so that one log_softmax serves them all, and targets [B, H, W]. All
return [B]; all but the perceptual one are means over the cells of the grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vq_vae.tokenizer import Tokenizer


def log_probabilities(logits: Tensor) -> Tensor:
    """Logits [B, V, H, W] in any precision -> log-probabilities [B, H, W, V] float32."""
    return logits.movedim(1, -1).float().log_softmax(-1)


def _mean_over_cells(x: Tensor) -> Tensor:
    """[B, H, W] -> [B]."""
    return x.flatten(1).mean(1)


def cross_entropy(log_probs: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Exact cross-entropy in nats with label smoothing (Szegedy et al., arXiv 1512.00567): the target gets
    1 - s + s/V of the mass, each other code s/V."""
    exact = -log_probs.gather(-1, target[..., None])[..., 0]
    if label_smoothing == 0:
        return _mean_over_cells(exact)
    return _mean_over_cells((1 - label_smoothing) * exact - label_smoothing * log_probs.mean(-1))


def neighbourhood_loss(log_probs: Tensor, target: Tensor, kernel: int = 3, exact_mix: float = 0.3) -> Tensor:
    """Cross-entropy that tolerates a shift: -log of the probability of any of the codes that the target has
    in the kernel x kernel cells around a cell; mixed with `exact_mix` of the exact cross-entropy.

    As the main loss it blurs, because any code of the neighbourhood counts as right.
    """
    pad = kernel // 2
    padded = F.pad(target[:, None].float(), (pad, pad, pad, pad), mode="replicate")
    around = F.unfold(padded, kernel).long()  # [B, k*k, H*W]
    around = around.transpose(1, 2).view(*target.shape, kernel * kernel)  # [B, H, W, k*k]
    # A code that occurs several times in the neighbourhood counts once.
    times = (around[..., :, None] == around[..., None, :]).sum(-1)
    near = torch.logsumexp(log_probs.gather(-1, around) - times.log(), -1)
    return exact_mix * cross_entropy(log_probs, target) + (1 - exact_mix) * _mean_over_cells(-near)


def semantic_loss(log_probs: Tensor, target: Tensor, codebook: Tensor) -> Tensor:
    """Mean squared error between the expected code vector and the target's; codebook [V, D]."""
    expected = log_probs.exp() @ codebook  # [B, H, W, D]
    return _mean_over_cells((expected - codebook[target]).square().mean(-1))


def entropy_floor_loss(log_probs: Tensor, floor: float) -> Tensor:
    """How far the entropy of each cell in nats is below `floor`; 0 above it."""
    return _mean_over_cells((floor - entropy(log_probs)).clamp_min(0))


def sharpness_loss(log_probs: Tensor) -> Tensor:
    """1 - the probability of the most likely code."""
    return _mean_over_cells(1 - log_probs.amax(-1).exp())


def temporal_loss(log_probs: Tensor, previous: Tensor) -> Tensor:
    """KL(previous || this) in nats per cell, between the predictions of the previous step and of this one.

    The previous step gets no gradient. A mean over cells; `batchmean` would be H*W times as large.
    """
    previous = previous.detach()
    return _mean_over_cells((previous.exp() * (previous - log_probs)).sum(-1))


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of each cell in nats: [B, H, W, V] -> [B, H, W]."""
    return -(log_probs.exp() * log_probs).sum(-1)


def straight_through_pictures(log_probs: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Pictures [B, 3, Hp, Wp] of the most likely codes, with the gradient of the expected code vector.

    Hard forward, soft backward (Bengio et al., arXiv 1308.3432): a mixture of code vectors would be outside
    the decoder's training distribution.
    """
    codebook = tokenizer.codebook
    hard = codebook[log_probs.argmax(-1)]
    soft = log_probs.exp() @ codebook
    return tokenizer.decode_vectors((soft + (hard - soft).detach()).permute(0, 3, 1, 2))


def perceptual_loss(log_probs: Tensor, target: Tensor, tokenizer: Tokenizer, distance: nn.Module) -> Tensor:
    """Perceptual distance of the straight-through decoded pictures to the decoded targets."""
    with torch.no_grad():
        truth = tokenizer.decode(target)
    return distance(straight_through_pictures(log_probs, tokenizer), truth)
