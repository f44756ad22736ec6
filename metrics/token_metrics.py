"""Metrics of grids of tokens."""

import math

import torch
from torch import Tensor


def token_accuracy(predicted: Tensor, truth: Tensor) -> Tensor:
    """Share of cells whose code is the true one. Tokens [..., H, W] -> [...] in 0..1; higher is better.

    Strict: codes change when the picture shifts by a fraction of a cell, so a correct picture can score low.
    Compare it with the copy baseline.
    """
    return (predicted == truth).float().mean((-2, -1))


def flip_rate(a: Tensor, b: Tensor) -> Tensor:
    """Share of cells whose code differs between two grids [..., H, W] -> [...] in 0..1.

    Lower is better between two pictures of the same view.
    """
    return 1 - token_accuracy(a, b)


def unique_codes(tokens: Tensor) -> Tensor:
    """Number of different codes in each grid. Tokens [..., H, W] -> [...] int64 in 1..H*W.

    The truth's value is best; far fewer codes mean a blurred picture.
    """
    ordered = tokens.flatten(-2).sort(-1).values
    return 1 + (ordered[..., 1:] != ordered[..., :-1]).sum(-1)


def codes_ratio(predicted: Tensor, truth: Tensor) -> Tensor:
    """Different codes in each predicted grid over those in the true one. Tokens [..., H, W] -> [...] > 0.

    1 is best; below it the prediction is simpler than the truth, above it noisier.
    """
    return unique_codes(predicted) / unique_codes(truth)


def bits_per_token(nats: float, tokens: int) -> float:
    """Cross entropy summed over `tokens` cells, in nats -> bits per cell.

    From 0 (every code predicted with certainty), log2(V) for a guess among V codes; lower is better.
    """
    return nats / tokens / math.log(2)


def code_usage(counts: Tensor) -> tuple[int, float]:
    """Counts of each code [V] -> (number of codes used, perplexity).

    Perplexity is exp(entropy of the code frequencies): from 1 (a single code) to V (all codes equally
    frequent), the effective number of codes. Higher is better. van den Oord et al., arXiv 1711.00937.
    """
    p = counts.float() / counts.sum().clamp_min(1)
    return int((counts > 0).sum()), float(torch.exp(torch.special.entr(p).sum()))
