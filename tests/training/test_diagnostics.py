"""Logged diagnostics: action sensitivity, spikes."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_world import CODES, COLUMNS, ROWS, small_convgru, write_world

from dataset.windows import TokenClips
from training.diagnostics import SpikeWatch, action_sensitivity


def test_action_sensitivity_is_zero_for_a_model_that_ignores_actions():
    model = small_convgru()
    tokens, actions = torch.randint(CODES, (4, 6, ROWS, COLUMNS)), torch.rand(4, 5, 5) * 2 - 1
    pose = torch.zeros(4, 6, 5)
    assert action_sensitivity(model, tokens, actions, pose) > 1e-4
    torch.nn.init.zeros_(model.film[0].weight)
    assert action_sensitivity(model, tokens, actions, pose) == 0


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> TokenClips:
    return TokenClips(write_world(tmp_path_factory.mktemp("world")), "train")


def test_spikes_are_reported_with_their_clips(clips, tmp_path):
    watch = SpikeWatch(tmp_path / "spikes.jsonl", clips, 3.0)
    windows = np.array([[1, 7]])
    for step in range(30):
        watch.check(step, 1.0, 0.5, windows, {})
    assert not (tmp_path / "spikes.jsonl").exists()
    watch.check(30, 9.0, 0.5, windows, {"ce": torch.tensor(9.0)})
    watch.check(31, math.nan, 0.5, windows, {})
    rows = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert [(r["step"], r["what"], r["windows"]) for r in rows] == [
        (30, "loss", ["clip1:7"]),
        (31, "loss", ["clip1:7"]),
    ]


def test_the_spike_factor_is_a_setting(clips, tmp_path):
    watch = SpikeWatch(tmp_path / "spikes.jsonl", clips, 10.0)
    for step in range(30):
        watch.check(step, 1.0, 0.5, np.array([[0, 0]]), {})
    watch.check(30, 9.0, 0.5, np.array([[0, 0]]), {})
    assert not (tmp_path / "spikes.jsonl").exists()
