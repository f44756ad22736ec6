"""evaluation/detail_recovery.py: recorded clips that are and are not interrupted."""

import numpy as np
import torch

from evaluation.detail_recovery import recorded_interruptions


def test_recorded_clips_that_keep_their_detail_are_not_interrupted():
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (200, 4, 8)))
    acts = np.ones(199, bool)
    rows = recorded_interruptions(tokens, acts, 16, 5)
    assert len(rows) == 4 and not rows[:, 1].any() and rows[0, 0] == 5
    tokens[100:] = 0
    rows = recorded_interruptions(tokens, acts, 16, 5)
    assert rows[1].tolist() == [50 / 16, 1], "14 frames without detail, after two with"
    assert not recorded_interruptions(tokens, np.zeros(199, bool), 16, 5)[:, 1].any(), (
        "the player stands still"
    )
