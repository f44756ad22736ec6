"""playing/overlay.py, on the shipped world."""

import numpy as np
import pytest

import live_inference
from geometry.keyframes import VISIBLE
from playing.overlay import CELL, OBSERVED, overlay


@pytest.fixture(scope="module")
def shipped():
    """A session on the shipped world and its first start place."""
    return live_inference.load_session(live_inference.parse_config(["--device", "cpu"]), only_first=True)


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
    stats = shipped.stats()
    assert len(stats["position"]) == 3 and stats["yaw"] != 0
