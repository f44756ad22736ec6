"""Numbers that are logged during training besides the loss, and the report of spikes."""

import json
import math
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.windows import TokenClips
from metrics import unique_codes
from rollout.world_model import WorldModel
from training import loss_terms
from training.window_parts import WindowResult
from vq_vae.tokenizer import Tokenizer

SPIKE_MEMORY, SPIKE_MINIMUM = 100, 20  # steps that the mean is over; with fewer than these none is reported


def step_values(result: WindowResult, loss: float, grad_norm: float) -> dict[str, float]:
    """The losses of one training step; NaN for that of self-fed steps where there were none."""
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        "loss_teacher": masked_mean(result.step_loss, ~result.self_fed),
        "loss_self_fed": masked_mean(result.step_loss, result.self_fed),
        **{f"loss_{name}": float(value) for name, value in result.terms.items()},
    }


def masked_mean(values: Tensor, mask: Tensor) -> float:
    """Mean of the values where the mask is true; NaN where it never is."""
    return float(values[mask].mean()) if mask.any() else math.nan


def prediction_values(result: WindowResult, target: Tensor, tokenizer: Tokenizer) -> dict[str, float]:
    """Numbers about the last prediction of a window against its target [B, H, W].

    `entropy` in nats and `confidence` (probability of the most likely code) over the cells, different codes
    per grid, and `spatial_gradient`, the mean absolute difference of neighbouring pixels of one prediction.
    """
    log_probs = result.last_log_probs
    confidence = log_probs.amax(-1).exp()
    predicted = log_probs.argmax(-1)
    picture = tokenizer.decode(predicted[:1])[0]
    return {
        "entropy": float(loss_terms.entropy(log_probs).mean()),
        "confidence_mean": float(confidence.mean()),
        "confidence_std": float(confidence.std()),
        "confidence_min": float(confidence.min()),
        "unique_codes": float(unique_codes(predicted).float().mean()),
        "unique_codes_target": float(unique_codes(target).float().mean()),
        "spatial_gradient": float(picture.diff(dim=1).abs().mean() + picture.diff(dim=2).abs().mean()),
        **film_strength(result.film),
    }


def film_strength(film: Tensor | None) -> dict[str, float]:
    """How strongly the action acts on the baseline's features: mean |gamma| and |beta| of FiLM."""
    if film is None:
        return {}
    return {f"film_{name}": float(film[..., i, :].abs().mean()) for i, name in enumerate(("gamma", "beta"))}


@torch.no_grad()
def action_sensitivity(model: WorldModel, tokens: Tensor, actions: Tensor, pose: Tensor) -> float:
    """How much the last action changes the predicted distribution: 0 (ignored) to 1.

    The last action of each sample is replaced by that of another sample of the batch; tokens and earlier
    actions stay. The result is the total variation distance between the two predictions, mean over cells.
    tokens [B, T+1, H, W], actions [B, T, 5], pose [B, T+1, 5].
    """
    state = model.init_state(len(tokens), tokens.device)
    for t in range(actions.shape[1] - 1):
        _, state = model.predict(tokens[:, t], actions[:, t], state, true_pose=pose[:, t])

    def probabilities(last: Tensor) -> Tensor:
        prediction, _ = model.predict(tokens[:, -2], last, state, true_pose=pose[:, -2])
        return model.logits(prediction).float().softmax(1)

    before, after = probabilities(actions[:, -1]), probabilities(actions[:, -1].roll(1, 0))
    return float((before - after).abs().sum(1).mean() / 2)


class SpikeWatch:
    """Reports steps whose loss or gradient norm is `factor` times the mean of the last 100 steps, or NaN."""

    def __init__(self, path: Path, clips: TokenClips, factor: float):
        self.path, self.clips, self.factor = path, clips, factor
        self.recent = {name: deque(maxlen=SPIKE_MEMORY) for name in ("loss", "grad_norm")}

    def check(self, step: int, loss: float, grad_norm: float, windows: np.ndarray, terms: dict) -> None:
        """Prints a spike and appends it to the file, with the start windows [B, 2] of its batch."""
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            past = self.recent[name]
            mean = sum(past) / max(1, len(past))
            if len(past) >= SPIKE_MINIMUM and not value <= self.factor * mean:
                starts = [f"{self.clips.entries[clip].name}:{start}" for clip, start in windows]
                row = {"step": step, "what": name, "value": value, "mean": mean}
                row |= {"terms": {k: float(v) for k, v in terms.items()}, "windows": starts}
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
                tqdm.write(f"step {step}: {name} {value:.3g}, mean so far {mean:.3g}; see {self.path}")
            if math.isfinite(value):
                past.append(value)
