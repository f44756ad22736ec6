"""training/motion_pretraining.py and motion_windows.py on walks in small voxel worlds."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from voxel_play import FOV, C, motion_clips

from geometry.keyframes import NEW_DEGREES, NEW_METRES
from geometry.motion import PlayerMotion
from geometry.physics import MotionConstants
from training.motion_pretraining import (
    UNKNOWN_NODE,
    fit_constants,
    last_stood,
    mirrored,
    node_samples,
    pretrain_player_motion,
)
from training.motion_windows import KEYFRAMES, MotionClips, observed_keyframes, roll_out


@pytest.fixture(scope="module")
def clips() -> MotionClips:
    return motion_clips(0, 6, 160)


def test_constants_are_found_in_recorded_poses(clips):
    other = MotionConstants(walk_speed=2.0, gravity=5.0, jump_speed=3.0, ground_acceleration=9.0, lattice=0.0)
    found = fit_constants(other, clips.pose, clips.actions)
    assert found.walk_speed == pytest.approx(C.walk_speed, rel=0.02)
    assert found.gravity == pytest.approx(C.gravity, rel=0.05)
    assert found.lattice == C.lattice and found.height == C.height
    assert fit_constants(other, [], []) == other
    unknown = [np.full_like(pose, np.nan) for pose in clips.pose]
    assert fit_constants(other, unknown, clips.actions) == other


def test_pretraining_finds_the_nodes_and_the_way(clips):
    motion, held_out = PlayerMotion(), motion_clips(1, 2, 120)
    evidence, ground, kind = node_samples(motion, held_out, FOV, 64, seed=0)
    known = kind != UNKNOWN_NODE

    def wrong() -> float:
        with torch.no_grad():
            found = motion.node_network(evidence.float(), ground).argmax(1)
        return float((found != kind)[known].float().mean())

    before = wrong()
    loss = pretrain_player_motion(motion, clips, FOV, 20, seed=0)
    assert math.isfinite(loss) and wrong() < before
    starts = np.array([(c, s) for c in range(2) for s in (20, 50, 80)])
    windows = held_out.windows(starts, 5 + 12, 5)
    poses = roll_out(motion, windows, 5, 15.0, FOV)
    error = (poses - windows.pose)[:, -1, :3].norm(dim=1)
    moved = (windows.pose[:, -1] - windows.pose[:, 5])[:, :3].norm(dim=1)
    assert torch.equal(poses[:, :6], windows.pose[:, :6])
    assert error.mean() < 0.35 * moved.mean()


def test_without_nodes_or_poses_the_defaults_stay(clips):
    motion = PlayerMotion()
    before = {name: value.clone() for name, value in motion.state_dict().items()}
    none = [np.full_like(pose, np.nan) for pose in clips.pose]
    assert math.isnan(
        pretrain_player_motion(motion, MotionClips(clips.actions, none, clips.depth), FOV, 5, 0)
    )
    assert all(torch.equal(value, before[name]) for name, value in motion.state_dict().items())
    unlabelled = MotionClips(clips.actions, clips.pose, clips.depth)
    assert math.isnan(pretrain_player_motion(motion, unlabelled, FOV, 5, 0))
    assert motion.constants != replace(motion.constants, walk_speed=C.walk_speed + 1)


def test_pretraining_depends_on_the_seed_alone(clips):
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        motion = PlayerMotion()
        pretrain_player_motion(motion, clips, FOV, 2, seed)
        return motion.node_network.out_proj.weight

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_keyframes_are_those_of_play(clips):
    pose = clips.pose[0]
    kept = observed_keyframes(pose)
    assert kept[0] == 0 and 2 < len(kept) <= len(pose)
    for a, b in zip(kept[:-1], kept[1:], strict=True):
        change = np.abs(pose[b] - pose[a])
        assert np.linalg.norm(change[:3]) > NEW_METRES or change[3:].max() > NEW_DEGREES
    before = clips.keyframes_before(0, 100)
    assert len(before) <= KEYFRAMES and before.max() <= 100


def test_windows_keep_the_lattice_and_end_in_unknown_poses(clips):
    windows = clips.windows(np.array([[0, 10], [1, 150]]), 20, 4)
    assert windows.pose[:, 0, :3].abs().max() <= 0.5
    true = torch.from_numpy(clips.pose[0][10:31, :3]).double() - windows.origin[0]
    assert torch.allclose(windows.pose[0, :, :3].double(), true, atol=1e-4)
    assert torch.equal(windows.origin, windows.origin.round())
    assert windows.pose[1, :10].isfinite().all() and windows.pose[1, 11:].isnan().all()
    assert windows.valid.any(1).all() and len(windows[:1]) == 1


def test_mirroring_moves_evidence_and_nodes_alike(clips):
    evidence, _, kind = node_samples(PlayerMotion(), clips, FOV, 8, seed=0)
    marked = evidence.float().zero_()
    marked[:, :8] = (kind[:, None] == 1).float()
    for seed in range(8):
        random = torch.Generator().manual_seed(seed)
        moved, target = mirrored(marked, kind, random)
        assert torch.equal(moved[:, 0] > 0, target == 1)


def test_the_ground_is_where_the_player_stood_last():
    pose = np.zeros((7, 5), np.float32)
    pose[:, 1] = [1.0, 1.0, 1.3, 1.5, 1.4, 2.0, 2.0]
    assert last_stood(pose).tolist() == [1, 1, 1, 1, 1, 1, 2]
