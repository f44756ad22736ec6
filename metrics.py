"""What is measured: pure functions, tensors in, numbers out, each with its meaning, range and direction.

Functions that compare pictures or grids give one value for each of them, so that the caller can average over
windows, horizons or clips; the rest give floats.
"""

import math

import numpy as np
import torch
from torch import Tensor

# The rounding noise of 8-bit pictures, (1/255)^2 / 12: closer ones cannot be told apart on a screen.
MSE_FLOOR = 1 / (12 * 255**2)
PSNR_CEILING = -10 * math.log10(MSE_FLOOR)  # 58.9 dB


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB: -10 log10(mean squared error).

    a, b [..., 3, H, W] in [0, 1] -> [...]. From 0 (black against white) to PSNR_CEILING (equal, or nearer to
    each other than 8-bit rounding; without it one still frame would outweigh all others); higher is better.
    """
    mse = (a.float() - b.float()).square().mean((-3, -2, -1))
    return -10 * mse.clamp_min(MSE_FLOOR).log10()


def token_accuracy(predicted: Tensor, truth: Tensor) -> Tensor:
    """Share of cells whose code is the true one. Tokens [..., H, W] -> [...] in 0..1; higher is better.

    Strict: a code flips when the picture shifts by a fraction of a cell, so a picture that looks right can
    score low. Read it beside the copy baseline.
    """
    return (predicted == truth).float().mean((-2, -1))


def unique_codes(tokens: Tensor) -> Tensor:
    """Number of different codes in each grid. Tokens [..., H, W] -> [...] int64 in 1..H*W.

    No direction of its own: like the truth's is good, far fewer means a picture collapsed to a blur.
    """
    ordered = tokens.flatten(-2).sort(-1).values
    return 1 + (ordered[..., 1:] != ordered[..., :-1]).sum(-1)


def codes_ratio(predicted: Tensor, truth: Tensor) -> Tensor:
    """Different codes in each predicted grid over those in the true one. Tokens [..., H, W] -> [...] > 0.

    1 is best; below it the prediction is poorer than the truth, above it noisier.
    """
    return unique_codes(predicted) / unique_codes(truth)


def bits_per_token(nats: float, tokens: int) -> float:
    """Cross entropy summed over `tokens` cells, in nats -> bits a cell.

    From 0 (every code foretold with certainty), log2(V) for a guess among V codes; lower is better.
    """
    return nats / tokens / math.log(2)


def code_usage(counts: Tensor) -> tuple[int, float]:
    """How often each code was used, counts [V] -> (number of codes used, perplexity).

    Perplexity is exp(entropy of the code frequencies), from 1 (one code does it all) to V (all used alike):
    how many codes the tokenizer really has. Higher is better. van den Oord et al., arXiv 1711.00937.
    """
    p = counts.float() / counts.sum().clamp_min(1)
    return int((counts > 0).sum()), float(torch.exp(torch.special.entr(p).sum()))


def bootstrap_interval(
    sums: np.ndarray, weights: np.ndarray, seed: int, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a weighted mean over clips (Efron & Tibshirani 1993, chapter 13).

    `sums` [N] is each clip's sum of values and `weights` [N] how many values it gave: the mean is
    sums.sum() / weights.sum(). Whole clips are drawn again, because the frames of one are alike.
    -> (low, high). One clip says nothing about the spread between clips: (nan, nan).
    """
    if len(sums) < 2:
        return math.nan, math.nan
    chosen = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = np.asarray(sums)[chosen].sum(1) / np.asarray(weights)[chosen].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
