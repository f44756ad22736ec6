"""geometry/occupancy.py: what depth rendered from a known world says about the nodes around the player."""

import math

import pytest
import torch
from torch import Tensor

from geometry import camera
from geometry.occupancy import (
    FEATURES,
    POINTS,
    REACH,
    SIDE,
    Occupancy,
    lowest_corner,
    occupancy_around,
    points_of_box,
    select_frames,
)

EYE, FOV, LATTICE = 1.47, 70.0, 0.5


def wall_and_ground(frames: Tensor, wall_z: float = 2.5, ground: float = 0.5) -> Tensor:
    """Inverse ray distances [K, 36, 64] of a ground at y = `ground` and a wall at z = `wall_z`, from feet
    poses [K, 5]."""
    rays = torch.einsum(
        "kij,hwj->khwi", camera.rotation(frames[:, 3], frames[:, 4]), camera.rays(36, 64, FOV)
    )
    down = rays[..., 1] / (frames[:, 1] + EYE - ground)[:, None, None]
    ahead = rays[..., 2] / (wall_z - frames[:, 2])[:, None, None]
    return torch.maximum(down, ahead).clamp(min=0)


def seen(pose: Tensor, frames: Tensor) -> Occupancy:
    """The evidence of frames [K, 5] around one pose [5]."""
    inverse = wall_and_ground(frames)[None]
    valid = torch.ones(1, len(frames), dtype=torch.bool)
    return occupancy_around(inverse, frames[None], valid, pose[None], FOV, EYE, LATTICE)


def by_node(occupancy: Occupancy) -> tuple[Tensor, Tensor]:
    """Mean evidence and mean weight of each node [X, Y, Z]."""
    points, weight = occupancy.evidence[0].unflatten(0, (2, POINTS**3)).unbind(0)
    return (points * weight).sum(0) / weight.sum(0).clamp(min=1e-6), weight.mean(0)


def test_the_wall_ahead_is_solid_and_the_air_before_it_is_free():
    pose = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0])
    frames = torch.stack(
        [pose, pose + torch.tensor([0.0, 0, -1, 0, 0]), pose + torch.tensor([0.0, 0, 0, 0, 25])]
    )
    evidence, weight = by_node(seen(pose, frames))
    middle = REACH
    ahead = evidence[middle, REACH + 1]  # the head's height, along z
    assert ahead[middle + 3] > 0.5 and weight[middle, REACH + 1, middle + 3] > 0.05
    assert torch.all(ahead[middle + 1 : middle + 3] < -0.5)
    assert evidence[middle, REACH - 1, middle + 2] > 0.3  # the ground before the wall


def test_what_no_frame_shows_is_unknown():
    pose = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0])
    _, weight = by_node(seen(pose, pose[None]))
    assert torch.all(weight[:, :, : REACH - 1] == 0)  # behind the player
    nothing = Occupancy.unknown(pose[None, :3], LATTICE)
    assert nothing.evidence.shape == (1, FEATURES, SIDE, SIDE, SIDE) and not nothing.evidence.any()


def test_invalid_frames_change_nothing():
    pose = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0]])
    frames = torch.cat([pose, torch.full((1, 5), torch.nan)])[None]
    inverse = torch.cat([wall_and_ground(pose), torch.full((1, 36, 64), 5.0)])[None]
    valid = torch.tensor([[True, False]])
    found = occupancy_around(inverse, frames, valid, pose, FOV, EYE, LATTICE)
    alone = occupancy_around(inverse[:, :1], frames[:, :1], valid[:, :1], pose, FOV, EYE, LATTICE)
    assert torch.equal(found.evidence, alone.evidence)


def test_the_evidence_does_not_depend_on_where_in_the_world_it_is():
    pose = torch.tensor([0.2, 0.5, -0.4, 10.0, 5.0])
    there = torch.tensor([120.0, 40.0, -77.0, 0.0, 0.0])
    frames = torch.stack([pose, pose + torch.tensor([0.3, 0, 0.2, 30, 0])])
    inverse, valid = torch.rand(1, 2, 36, 64), torch.ones(1, 2, dtype=torch.bool)
    here = occupancy_around(inverse, frames[None], valid, pose[None], FOV, EYE, LATTICE)
    moved = occupancy_around(inverse, (frames + there)[None], valid, (pose + there)[None], FOV, EYE, LATTICE)
    assert (here.evidence - moved.evidence).abs().mean() < 0.01  # points on the edge of a pixel may flip
    assert torch.allclose(here.lowest + there[:3], moved.lowest)


def test_the_box_has_the_player_in_its_middle_node():
    feet = torch.tensor([[0.2, 0.5, -0.7], [0.2, 0.49999, -0.7], [3.0, 1.2, 0.49]])
    inside = feet + torch.tensor([0.0, 0.01, 0.0]) - lowest_corner(feet, LATTICE)
    assert torch.all((inside >= REACH) & (inside < REACH + 1))
    points = points_of_box(lowest_corner(feet, LATTICE))
    assert points.shape == (3, SIDE**3 * POINTS**3, 3)
    assert torch.allclose(points.mean(1), lowest_corner(feet, LATTICE) + SIDE / 2)


def test_frames_are_chosen_that_look_in_different_directions():
    pose = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0]])
    yaw = torch.tensor([0.0, 1.0, 2.0, 90.0, 180.0, 270.0, 0.0])
    frames = torch.zeros(1, 7, 5)
    frames[0, :, 1], frames[0, :, 3], frames[0, :, 4] = 0.5 + EYE, yaw, 30.0
    valid = torch.ones(1, 7, dtype=torch.bool)
    valid[0, 6] = False
    chosen = select_frames(frames, valid, pose[:, :3], 4, FOV)[0].tolist()
    assert {3, 4, 5} < set(chosen) and 6 not in chosen


@pytest.mark.parametrize("lattice", [0.0, 0.5])
def test_the_lattice_says_where_nodes_begin(lattice):
    corner = lowest_corner(torch.tensor([[0.2, 3.0, 7.9]]), lattice)
    assert torch.allclose(torch.remainder(corner, 1.0), torch.full((1, 3), math.fmod(lattice, 1.0)))
