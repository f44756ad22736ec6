"""Section 7: the tokenizer, which no world that uses it can be better than."""

import numpy as np
import torch

import metrics
from evaluation.aggregate import Scores
from evaluation.controllability import pairs_at_rest
from evaluation.held_out_clips import HeldOutClips
from evaluation.rollouts import Recorded


def measure(held: HeldOutClips, recorded: Recorded, scores: Scores) -> None:
    """`tokenizer.*`: psnr, ssim and perceptual distance of its reconstructions of the true pictures of the
    windows; used_codes and perplexity over all held-out tokens; flip_rate, the share of codes that differ
    between two recorded frames between which neither player nor camera moved."""
    for name, values in recorded.rows["truth"].values.items():
        if name.endswith("_frames"):
            scores.mean(f"tokenizer.{name.removesuffix('_frames')}", values, recorded.clips)
    counts = sum(np.bincount(t.ravel(), minlength=held.manifest.codebook_size) for t in held.clips.tokens)
    used, perplexity = metrics.code_usage(torch.from_numpy(counts))
    scores.add("tokenizer.used_codes", used)
    scores.add("tokenizer.perplexity", perplexity)
    still = pairs_at_rest(held, turning=False)
    if len(still):
        tokens = held.batch(still, 2)[0]
        scores.mean("tokenizer.flip_rate", metrics.flip_rate(tokens[:, 0], tokens[:, 1]).numpy(), still[:, 0])
