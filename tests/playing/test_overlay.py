"""playing/overlay.py, on the shipped world."""

import numpy as np
import pytest
import torch

import live_inference
from geometry.keyframes import VISIBLE
from playing.overlay import (
    BACKGROUND,
    BLOCKED,
    CELL,
    DROP,
    LEGEND_HEIGHT,
    LOW,
    NODE,
    OBSERVED,
    node_colours,
    overlay,
)


@pytest.fixture(scope="module")
def shipped():
    """A session on the shipped world and its first start place."""
    return live_inference.load_session(live_inference.parse_config(["--device", "cpu"]), only_first=True)


@torch.inference_mode()
def test_the_overlay_shows_keyframes_and_sources(shipped):
    assert overlay(shipped) is None  # no step yet
    for _ in range(6):
        shipped.step(np.array([0.8, 0, 0, 1, 0], np.float32))
    picture = overlay(shipped)
    assert picture.dtype == np.uint8 and picture.ndim == 3
    sources = picture[-18 * CELL :, -32 * CELL :].astype(int)
    red = sources[..., 0] > sources[..., 1:].max(-1)
    disoccluded = shipped.prediction.visible_mask[0].numpy() <= VISIBLE
    assert np.array_equal(red, disoccluded.repeat(CELL, 0).repeat(CELL, 1))
    assert 0 < disoccluded.sum() < disoccluded.size
    blue = sources[..., 2] > sources[..., :2].max(-1)
    keyframes = (shipped.prediction.view.source[0].numpy() > 0) & ~disoccluded
    assert np.array_equal(blue, keyframes.repeat(CELL, 0).repeat(CELL, 1)) and keyframes.any()
    assert (picture == np.array(OBSERVED)).all(-1).any()
    occupancy, motion = shipped.prediction.occupancy, shipped.rollout.model.motion_model
    ground = shipped.rollout.state.motion[:, 7] - occupancy.lowest[:, 1]
    nodes = node_colours(motion.filled(occupancy, ground)[0].numpy(), motion.constants.step_height)
    expected = nodes.swapaxes(0, 1).repeat(NODE, 0).repeat(NODE, 1)
    side, bottom = len(expected), len(picture) - 2 * LEGEND_HEIGHT - 1
    shown = picture[bottom - side : bottom, 1 : side + 1]
    assert (shown == expected).all(-1).mean() > 0.98, "all but the dot of the player"
    stats = shipped.stats()
    assert len(stats["position"]) == 3 and stats["yaw"] != 0


def test_colours_of_the_nodes_around_the_player():
    filled = np.zeros((7, 7, 7), np.float32)
    filled[:, 2] = 1  # the ground, one node below the feet's
    filled[0, 3, 0] = 1  # a block at the feet
    filled[1, 4, 0] = 1  # ... and one at the head
    filled[2, 3, 0] = 0.25  # snow
    filled[3, :, 0] = 0  # a hole
    filled[4, 2, 0], filled[4, 1, 0] = 0, 1  # the ground is one node lower
    colours = node_colours(filled, step_height=0.6)[:6, 0]
    assert colours.tolist() == [list(c) for c in (BLOCKED, BLOCKED, LOW, DROP, BACKGROUND, BACKGROUND)]
