"""The loss of the depth network: errors of log inverse ray distances, near surfaces weighing more.

A plain L1 in inverse distance is ruled by walls in front of the nose and does not train; a plain L1 in its
logarithm spends itself on far hills, whose distance hardly matters for a warp. Hence L1 in the logarithm with
a weight that falls with the distance.
"""

import torch
from torch import Tensor

FULL_WEIGHT_M = (
    10.0  # metres: what is nearer has weight 1; then the weight is inverse to the ray distance ...
)
FAR_WEIGHT = 0.15  # ... down to this
GRADIENT_SCALES = (1, 2, 4)  # distances between neighbours in `gradient_error`, in positions of the output


def near_weight(target: Tensor) -> Tensor:
    """True log inverse ray distances [B, H, W] -> weights of the positions [B, H, W], FAR_WEIGHT..1."""
    return (target.exp() * FULL_WEIGHT_M).clamp(FAR_WEIGHT, 1)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of values with weights of the same shape, a scalar."""
    return (values * weight).sum() / weight.sum()


def depth_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Weighted mean absolute error of log inverse ray distances [B, H, W]; 0.1 is 10 % of the distance."""
    return weighted_mean((predicted - target).abs(), near_weight(target))


def gradient_error(predicted: Tensor, target: Tensor) -> Tensor:
    """How much the error differs between neighbours: the weighted mean over both directions and scales.

    It sharpens edges and flattens surfaces. Multi-scale gradient matching of Li and Snavely (MegaDepth, arXiv
    1804.00607, section 4), on log inverse ray distances [B, H, W].
    """
    error, weight = predicted - target, near_weight(target)
    terms = []
    for scale in GRADIENT_SCALES:
        for dim in (1, 2):
            length = error.shape[dim] - scale
            if length < 1:
                continue
            change = error.narrow(dim, scale, length) - error.narrow(dim, 0, length)
            both = torch.maximum(weight.narrow(dim, scale, length), weight.narrow(dim, 0, length))
            terms.append(weighted_mean(change.abs(), both))
    return torch.stack(terms).mean()


def error_likelihood(log_error: Tensor, predicted: Tensor, target: Tensor) -> Tensor:
    """Negative log likelihood of the errors made, under a Laplace distribution whose mean absolute error is
    exp(log_error) [B, H, W]. Lowest where that is the mean of |predicted - target|; `predicted` gets no
    gradient. Kendall and Gal, arXiv 1703.04977, section 3."""
    made = (predicted - target).abs().detach()
    return (made * (-log_error).exp() + log_error).mean()
