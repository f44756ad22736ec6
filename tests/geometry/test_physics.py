"""geometry/physics.py: a player walks over maps that are made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from geometry.physics import Body, MotionConstants, Nodes, accelerate, advance

C = MotionConstants()
SIDE, GROUND = 9, 4  # nodes of the map per axis; those below GROUND are solid
LOWEST = np.array([[-0.5, -0.5, -0.5]])
START = np.array([[4.0, GROUND - 0.5, 4.0]])  # in the middle of a node, on the ground


def flat() -> np.ndarray:
    """Filled heights [1, X, Y, Z] of a flat ground; nodes are centred on whole numbers."""
    top = np.zeros((1, SIDE, SIDE, SIDE))
    top[:, :, :GROUND] = 1
    return top


def walk(top: np.ndarray, frames: int, velocity=(0.0, 0.0), jump_at=(), feet=START, c=C) -> np.ndarray:
    """Feet [frames+1, 3] of a player that wants to walk with `velocity` (x, z)."""
    body = Body(np.array(feet, float), np.zeros((1, 3)), np.ones(1, bool))
    path = [body.feet[0]]
    for t in range(frames):
        body = advance(body, np.array([velocity]), np.array([t in jump_at]), Nodes(top, LOWEST), c)
        path.append(body.feet[0])
    return np.stack(path)


def test_standing_still_on_the_ground_changes_nothing():
    assert np.array_equal(walk(flat(), 10), np.repeat(START, 11, 0))


def test_the_walk_speed_is_reached_in_three_frames_and_lost_as_fast():
    path = walk(flat(), 8, (3.0, 0.0))
    step = np.diff(path[:, 0])
    assert step[0] == pytest.approx(C.ground_acceleration / 16**2 / 2)
    assert step[-1] == pytest.approx(3.0 / 16) and np.all(path[:, 1] == path[0, 1])


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_acceleration_agrees_with_many_small_steps(share):
    start, wanted, limit = np.array([[1.0, -2.0]]), np.array([[3.0, 1.0]]), np.array([30.0])
    moved, velocity = accelerate(start, wanted, limit, share * 0.2)
    small = start
    total = np.zeros((1, 2))
    for _ in range(2000):
        before = small
        change = wanted - small
        length = np.hypot(*change[0])
        small = small + change * min(1, limit[0] * share * 1e-4 / max(length, 1e-12))
        total += (before + small) / 2 * share * 1e-4
    assert np.allclose(moved, total, atol=1e-4) and np.allclose(velocity, small, atol=1e-4)


def test_a_wall_stops_the_box_at_its_face():
    top = flat()
    top[:, 6:, GROUND : GROUND + 2] = 1
    path = walk(top, 20, (C.walk_speed, 0.0))
    assert path[-1, 0] == pytest.approx(5.5 - C.half_width)
    assert np.all(np.diff(path[:, 0]) >= 0) and np.all(path[:, 2] == 4)


def test_it_slides_along_a_wall():
    top = flat()
    top[:, 6:, GROUND : GROUND + 2] = 1
    path = walk(top, 16, (2.5, -2.5))
    assert path[-1, 0] == pytest.approx(5.5 - C.half_width) and path[-1, 2] < 2.5


def test_a_step_of_half_a_node_is_climbed_and_a_whole_one_is_not():
    for height, climbed in ((0.5, True), (1.0, False)):
        top = flat()
        top[:, 6:, GROUND] = height
        path = walk(top, 12, (C.walk_speed, 0.0))
        assert (path[-1, 0] > 6) == climbed
        assert path[-1, 1] == pytest.approx(START[0, 1] + (height if climbed else 0))


def test_a_jump_rises_as_high_as_its_speed_allows_and_lands():
    path = walk(flat(), 16, jump_at=range(2))
    assert path[:, 1].max() - START[0, 1] == pytest.approx(C.jump_speed**2 / 2 / C.gravity, abs=0.03)
    assert path[-1, 1] == START[0, 1]
    top = flat()
    top[:, :, GROUND + 2 :] = 1  # a ceiling 2 m over the ground: the head has 0.3 m of room
    assert walk(top, 16, jump_at=range(2))[:, 1].max() == pytest.approx(START[0, 1] + 0.3)


def test_a_jump_gets_onto_a_block():
    top = flat()
    top[:, 6:, GROUND] = 1
    path = walk(top, 20, (C.walk_speed, 0.0), jump_at=range(20))
    assert path[-1, 0] > 6 and path[-1, 1] >= START[0, 1] + 1


def test_it_falls_off_an_edge_with_gravity():
    top = flat()
    top[:, 6:, 1:GROUND] = 0
    path = walk(top, 24, (2.5, 0.0))
    edge = np.flatnonzero(np.diff(path[:, 1]) < 0)[0]
    assert path[edge + 1, 0] > 5.5 + C.half_width - 0.01  # the box has left the edge
    assert path[-1, 1] == pytest.approx(0.5)
    fall = np.diff(path[edge + 1 :, 1])[:3]
    assert np.diff(fall)[0] == pytest.approx(-C.gravity / 16**2, rel=0.1)


def test_what_is_inside_a_node_is_not_held_in_it():
    top = flat()
    top[:, 4, GROUND : GROUND + 2, 4] = 1  # the map says that the player is inside a block
    assert walk(top, 8, (C.walk_speed, 0.0))[-1, 0] > 5


def test_a_body_that_overlaps_a_wall_by_little_does_not_pass_it():
    top = flat()
    top[:, 6:, GROUND : GROUND + 2] = 1
    feet = START + [[1.5 - C.half_width + 0.02, 0, 0]]
    path = walk(top, 8, (C.walk_speed, 0.0), feet=feet)
    assert path[-1, 0] <= feet[0, 0]


def test_players_of_a_batch_do_not_mix():
    wall = flat()
    wall[:, 6:, GROUND : GROUND + 2] = 1
    nodes = Nodes(np.concatenate([flat(), wall]), np.repeat(LOWEST, 2, 0))
    body = Body(np.repeat(START, 2, 0), np.zeros((2, 3)), np.ones(2, bool))
    for _ in range(12):
        body = advance(body, np.array([[C.walk_speed, 0.0]] * 2), np.zeros(2, bool), nodes, C)
    assert body.feet[1, 0] == pytest.approx(5.5 - C.half_width) and body.feet[0, 0] > 6


def test_constants_survive_a_checkpoint():
    c = replace(C, walk_speed=4.3, lattice=0.0)
    assert MotionConstants(*c.as_list()) == c
