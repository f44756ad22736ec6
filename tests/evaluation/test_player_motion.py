"""evaluation/player_motion.py on walks in small voxel worlds, with players that do what is known."""

import numpy as np
import pytest
import torch
from voxel_play import motion_clips

from dataset.actions import horizontal_metres
from evaluation import player_motion
from evaluation.aggregate import Scores
from training.motion_windows import MotionClips, MotionWindows

GIVEN = 3


@pytest.fixture(scope="module")
def clips() -> MotionClips:
    return motion_clips(2, 8, 200)


def measured(clips: MotionClips, rolled_out) -> dict[str, float]:
    scores = Scores(0)
    player_motion.measure(clips, player_motion.choose(clips, GIVEN, 12, 20, 0), rolled_out, scores)
    return scores.metrics


def recorded(windows: MotionWindows, given: int) -> torch.Tensor:
    """The recording itself; where that ends it stays."""
    poses = windows.pose.clone()
    for t in range(1, poses.shape[1]):
        poses[:, t] = torch.where(poses[:, t].isnan(), poses[:, t - 1], poses[:, t])
    return poses


def standing(windows: MotionWindows, given: int) -> torch.Tensor:
    """Stops where the model is on its own."""
    poses = windows.pose.clone()
    poses[:, given + 1 :, :3] = poses[:, given : given + 1, :3]
    return poses


def test_the_recording_itself_is_without_error(clips):
    found = measured(clips, recorded)
    for key in ("h8.error", "h20.error", "h20.up", "landing"):
        assert found[f"motion.{key}"] == pytest.approx(0, abs=1e-6)
    for key in ("stops", "free", "blocked_f1", "blocked_precision", "blocked_recall"):
        assert found[f"motion.{key}"] == 1
    for key in ("stops_count", "free_count", "landing_count", "blocked_count"):
        assert found[f"motion.{key}"] > 0
    assert found["standing.motion.h20.error"] > 0.5


def test_a_player_that_does_not_move_is_wrong(clips):
    found = measured(clips, standing)
    assert found["motion.h20.error"] == found["standing.motion.h20.error"]
    assert found["motion.stops"] == found["motion.free"] == 0
    assert found["motion.blocked_recall"] == 1 and found["motion.blocked_precision"] < 0.7


def test_a_ghost_passes_obstacles(clips):
    def ghost(windows: MotionWindows, given: int) -> torch.Tensor:
        poses = recorded(windows, given)
        for t in range(given, poses.shape[1] - 1):
            sin, cos = (f(torch.deg2rad(poses[:, t, 3])) for f in (torch.sin, torch.cos))
            poses[:, t + 1, :3] = poses[:, t, :3] + 0.25 * torch.stack([-sin, 0 * sin, cos], 1)
        return poses

    found = measured(clips, ghost)
    assert found["motion.free"] == 1 and found["motion.stops"] == 0 and found["motion.blocked_recall"] == 0


def test_paths_are_straight_and_long_enough(clips):
    stops, free = player_motion.straight_paths(clips, GIVEN)
    for clip, start, steps in np.concatenate([stops, free]):
        pose = clips.pose[clip][start : start + steps + 1]
        assert player_motion.turned(pose) < player_motion.STRAIGHT_DEGREES and start >= GIVEN
        length = np.linalg.norm((pose[-1] - pose[0])[[0, 2]])
        assert length > 0.9 * player_motion.LEAST_METRES
    for clip, start, steps in stops:
        after = horizontal_metres(clips.pose[clip])[start + steps :][: player_motion.STOPPED_FRAMES]
        assert (after < player_motion.BLOCKED_METRES).all()
