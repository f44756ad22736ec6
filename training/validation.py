"""Validation during training: teacher-forced prediction and short rollouts on held-out windows."""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.token_files import MANIFEST, Manifest
from dataset.windows import TokenClips, epoch_windows
from geometry import camera
from metrics import bits_per_token, psnr
from rollout.rollout import Rollout
from rollout.sampling import PLAY
from rollout.world_model import WorldModel
from runtime.device import autocast
from runtime.video import grid, to_uint8
from training import loss_terms
from training.train_config import TrainConfig
from vq_vae.tokenizer import Tokenizer

CONTEXT, ROLLOUT = 6, 20  # frames of a validation rollout: recorded, then generated


def load_held_out(directory: str | Path, tokenizer: str, frames: int) -> TokenClips | None:
    """The held-out clips of the token files in `directory`, by the fingerprint of their tokenizer.

    None, with a warning, where no clip is held out or none has the `frames` of a window: training then goes
    without validation. Raises DataError for token files that cannot be used.
    """
    manifest = Manifest.load(directory)
    found = "no clip is held out"
    if any(clip.part("val") for clip in manifest.clips):
        clips = TokenClips(directory, "val", tokenizer)
        if max(len(tokens) for tokens in clips.tokens) >= frames:
            return clips
        found = f"the held-out clips are shorter than the {frames} frames of a window"
    print(
        f"warning: {Path(directory) / MANIFEST}: {found}; training without validation, and best.pt is the "
        "newest weights: record more, or give preprocess.py another --val_fraction",
        file=sys.stderr,
    )
    return None


@torch.no_grad()
def validate(
    model: WorldModel, clips: TokenClips, config: TrainConfig, dtype: torch.dtype
) -> tuple[dict[str, float], np.ndarray]:
    """Metrics over the same VAL_WINDOWS windows each time, and a picture of truth and prediction.

    Teacher-forced: `val_bits_per_token`, `val_accuracy` and, where poses are known, the accuracy of
    disoccluded cells. Rollouts: see `rollout_psnr`. Global random state is left alone, so a run is the same
    with more or fewer validations. `dtype` is that of autocast. Leaves the model in eval mode.
    """
    device = next(model.parameters()).device
    lengths = [len(t) for t in clips.tokens]
    windows = epoch_windows(lengths, config.seq_len + 1, config.seed, 0)[: config.val_windows]
    nats, right, cells, picture = 0.0, 0, 0, None
    disoccluded_right, disoccluded_cells = 0, 0
    model.eval()
    for i in range(0, len(windows), config.batch_size):
        batch = clips.batch(windows[i : i + config.batch_size], config.seq_len + 1)
        tokens, actions, pose = (x.to(device) for x in batch)
        state = model.init_state(len(tokens), device)
        with autocast(device, dtype):
            for t in range(config.seq_len):
                prediction, state = model.predict(tokens[:, t], actions[:, t], state, true_pose=pose[:, t])
                log_probs = loss_terms.log_probabilities(model.logits(prediction))
                target = tokens[:, t + 1]
                nats += float(loss_terms.cross_entropy(log_probs, target).sum()) * target[0].numel()
                correct = log_probs.argmax(-1) == target
                right += int(correct.sum())
                cells += target.numel()
                disoccluded = camera.disoccluded_mask(
                    pose[:, t], pose[:, t + 1], *target.shape[1:], clips.manifest.vertical_fov_degrees
                )
                disoccluded_right += int((correct & disoccluded).sum())
                disoccluded_cells += int(disoccluded.sum())
        if picture is None:
            picture = truth_and_prediction(model.tokenizer, tokens[:4, -1], log_probs[:4].argmax(-1))
    metrics = {"val_bits_per_token": bits_per_token(nats, cells), "val_accuracy": right / cells}
    if disoccluded_cells:
        metrics["val_disoccluded_accuracy"] = disoccluded_right / disoccluded_cells
    if config.val_rollouts:
        metrics["val_rollout_psnr"] = rollout_psnr(model, clips, config.val_rollouts, config.seed, dtype)
    return metrics, picture


@torch.no_grad()
def rollout_psnr(model: WorldModel, clips: TokenClips, count: int, seed: int, dtype: torch.dtype) -> float:
    """PSNR in dB of generated frames against the decoded recorded ones, the mean over `count` rollouts.

    Each rollout generates ROLLOUT frames after CONTEXT recorded ones. NaN where no clip is long enough.
    """
    frames = CONTEXT + ROLLOUT
    windows = epoch_windows([len(t) for t in clips.tokens], frames, seed, 0)[:count]
    if not len(windows):
        return math.nan
    tokens, actions, pose = clips.batch(windows, frames)
    rollout = Rollout(model, PLAY, seed, dtype)
    rollout.prime(tokens[:, :CONTEXT], actions[:, : CONTEXT - 1], pose[:, :CONTEXT])
    decibels = []
    for t in range(CONTEXT, frames):
        generated = rollout.step(actions[:, t - 1])
        pictures = (model.tokenizer.decode(x.to(generated.device)).cpu() for x in (generated, tokens[:, t]))
        decibels.append(psnr(*pictures).mean())
    return float(torch.stack(decibels).mean())


@torch.no_grad()
def truth_and_prediction(tokenizer: Tokenizer, truth: Tensor, predicted: Tensor) -> np.ndarray:
    """Decoded truth in the left column, prediction in the right: [N, H, W] tokens each -> one picture."""
    pictures = to_uint8(tokenizer.decode(torch.stack([truth, predicted], 1).flatten(0, 1)))
    return grid(list(pictures.numpy()), columns=2)
