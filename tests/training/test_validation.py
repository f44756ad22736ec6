"""Validation during training: teacher-forced metrics, rollouts, and that it leaves the run alone."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import CONVGRU, settings, small_convgru, write_world

from dataset.windows import TokenClips, epoch_windows
from training import loss_terms, validation
from training.validation import rollout_psnr, validate
from vq_vae.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def model(world):
    model = small_convgru()
    model.tokenizer = load_tokenizer(world / "vqvae.pt")
    return model


def test_metrics_are_those_of_the_forward_pass(world, model):
    clips = TokenClips(world, "val")
    config = settings(world, world, CONVGRU | {"val_windows": 3, "batch_size": 2, "val_rollouts": 0})
    before = torch.get_rng_state()
    metrics, picture = validate(model, clips, config, torch.float32)
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training, "a moving average stays in eval mode"
    windows = epoch_windows([len(t) for t in clips.tokens], 6, config.seed, 0)[:3]
    tokens, actions, _ = clips.batch(windows, 6)
    with torch.no_grad():
        logits = model(tokens[:, :-1], actions)[0]
    log_probs = loss_terms.log_probabilities(logits.flatten(0, 1))
    target = tokens[:, 1:].flatten(0, 1)
    nats = loss_terms.cross_entropy(log_probs, target).mean().item()
    assert metrics["val_bits_per_token"] == pytest.approx(nats / math.log(2), rel=1e-5)
    right = (log_probs.argmax(-1) == target).float().mean().item()
    assert metrics["val_accuracy"] == pytest.approx(right, abs=1e-6)
    assert "val_rollout_psnr" not in metrics
    assert picture.shape == (2 * 12, 2 * 16, 3) and picture.dtype == np.uint8, "truth beside prediction"


def test_rollouts_are_repeatable_and_need_long_clips(world, model, monkeypatch):
    clips = TokenClips(world, "val")
    first, second = (rollout_psnr(model.eval(), clips, 2, 1, torch.float32) for _ in range(2))
    assert math.isfinite(first) and first == second
    monkeypatch.setattr(validation, "ROLLOUT", 1000)
    assert math.isnan(rollout_psnr(model, clips, 2, 1, torch.float32))
