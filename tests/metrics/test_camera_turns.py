"""Camera rotation measured in rendered views of recorded pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.token_files import SAMPLES
from geometry import camera
from metrics import grey, measure_turns
from runtime.video import read_frames

FOV, WIDE = 70.0, 100.0  # degrees, vertical


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    """Recorded pictures [N, 1, 144, 256] in grey, used as infinitely distant scenes."""
    frames = [
        frame
        for video in sorted((SAMPLES / "video").glob("*.mp4"))
        for frame in read_frames(video, wanted=range(30, 480, 150))
    ]
    return grey(torch.from_numpy(np.stack(frames)).float().permute(0, 3, 1, 2) / 255)[:, None]


def view(scenes: Tensor, scene_pose: Tensor, yaw: float, pitch: float) -> Tensor:
    """The view at `yaw` and `pitch` of infinitely distant scenes WIDE degrees high."""
    pose = torch.tensor([0.0, 0.0, 0.0, yaw, pitch])[None]
    sharp = 2  # rendered larger, then averaged, against aliasing
    directions = camera.rays(72 * sharp, 128 * sharp, FOV)
    world = torch.einsum("ij,hwj->hwi", camera.rotation(pose[0, 3], pose[0, 4]), directions)
    away = torch.einsum("ij,hwi->hwj", camera.rotation(scene_pose[0], scene_pose[1]), world)
    grid, inside = camera.project(away[None], 144, 256, WIDE)
    assert inside.float().mean() > 0.99, "the view lies within the scene"
    return F.avg_pool2d(camera.warp(scenes, grid.expand(len(scenes), -1, -1, -1)), sharp)


def turned(scenes: Tensor, yaw: float, by: float, pitch: float) -> tuple[Tensor, Tensor]:
    """The views before and after a turn to the right by `yaw` and down by `by` from `pitch`."""
    middle = torch.tensor([yaw / 2, pitch + by / 2])
    return view(scenes, middle, 0.0, pitch), view(scenes, middle, yaw, pitch + by)


@pytest.mark.parametrize("pitch", [-30.0, 0.0, 40.0])
@pytest.mark.parametrize("yaw, by", [(1, 0), (-15, 0), (0, 2), (0, 15), (0, -15), (10, 10), (15, -15)])
def test_measured_turns_of_recorded_pictures_are_the_turns(scenes, pitch, yaw, by):
    before, after = turned(scenes, yaw, by, pitch)
    found = measure_turns(before, after, np.full(len(scenes), pitch), FOV)
    assert found.shape == (len(scenes), 3)
    error = np.abs(found[:, :2] - [yaw, by])
    assert np.median(error, 0).max() < 0.05 and np.quantile(error, 0.9, 0).max() < 0.4
    assert np.median(found[:, 2]) > 0.9


def test_a_still_camera_does_not_turn_and_different_scenes_do_not_correlate(scenes):
    still = measure_turns(*turned(scenes, 0, 0, 10.0), np.full(len(scenes), 10.0), FOV)
    np.testing.assert_allclose(still[:, :2], 0, atol=0.05)
    assert (still[:, 2] > 0.99).all()
    before, after = turned(scenes, 5, 0, 10.0)
    other = measure_turns(before, after.roll(3, 0), np.full(len(scenes), 10.0), FOV)
    assert np.median(other[:, 2]) < 0.6, "a low correlation: the pictures are of different scenes"


def test_turns_are_measured_per_pair_and_an_unknown_pitch_counts_as_level(scenes):
    before, after = turned(scenes[:1], 4, 0, 0.0)
    pitch = np.full(130, np.nan)  # more pairs than a batch
    pitch[1] = 0.0
    found = measure_turns(before.expand(130, -1, -1, -1), after.expand(130, -1, -1, -1), pitch, FOV)
    assert found.shape == (130, 3)
    np.testing.assert_allclose(found, found[:1].repeat(130, 0), atol=1e-6)
    assert measure_turns(before[:0], after[:0], pitch[:0], FOV).shape == (0, 3)
