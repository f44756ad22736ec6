"""Section tokenizer: what the tokenizer loses. No world model that uses it can do better."""

import numpy as np
import torch

import metrics
from evaluation.aggregate import Scores
from evaluation.controllability import pairs_at_rest
from evaluation.held_out_clips import HeldOutClips
from evaluation.rollouts import RecordedWindows


def measure(held_out: HeldOutClips, recorded: RecordedWindows, scores: Scores) -> None:
    """`tokenizer.*`.

    `psnr`, `ssim`, `edge_f1`, `perceptual`: of the reconstructions of the windows' original pictures;
    `used_codes`, `perplexity`: over all held-out tokens; `flip_rate`: share of codes that differ between two
    recorded frames between which neither the player nor the camera moved.
    """
    for name, values in recorded.sources["recording"].values.items():
        if name.endswith("_frames"):
            scores.mean(f"tokenizer.{name.removesuffix('_frames')}", values, recorded.clips)
    codes = held_out.manifest.codebook_size
    counts = sum(np.bincount(tokens.ravel(), minlength=codes) for tokens in held_out.clips.tokens)
    used, perplexity = metrics.code_usage(torch.from_numpy(counts))
    scores.add("tokenizer.used_codes", used)
    scores.add("tokenizer.perplexity", perplexity)
    pairs = pairs_at_rest(held_out, turning=False)
    if len(pairs):
        tokens = held_out.clips.batch(pairs, 2)[0]
        flips = metrics.flip_rate(tokens[:, 0], tokens[:, 1])
        scores.mean("tokenizer.flip_rate", flips.numpy(), pairs[:, 0])
