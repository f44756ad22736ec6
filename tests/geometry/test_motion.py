"""geometry/motion.py: the player's displacement from keys, past steps and the nodes around it."""

import pytest
import torch

from geometry.motion import (
    CLEARANCE,
    MAX_FALL,
    STATE,
    PlayerMotion,
    displacement_between,
    from_world,
    next_pose,
    to_world,
)
from geometry.occupancy import POINTS, REACH, Occupancy

STEP = 1 / 16  # seconds
FORWARD, JUMP = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.0]])
NO_KEY, NO_TURN = torch.zeros(1, 3), torch.zeros(1)


@pytest.fixture
def motion() -> PlayerMotion:
    torch.manual_seed(0)
    return PlayerMotion()


def play(motion: PlayerMotion, keys: list, yaw: float = 0.0, solid=None) -> torch.Tensor:
    """Poses [T+1, 5] of a player on unknown, flat ground; `solid`: nodes that the evidence says are solid."""
    pose, displacement = torch.tensor([[0.0, 0.5, 0.0, yaw, 0.0]]), torch.zeros(1, 3)
    state, poses = motion.init_state(1), [torch.tensor([[0.0, 0.5, 0.0, yaw, 0.0]])]
    for key in keys:
        occupancy = Occupancy.unknown(pose[:, :3], motion.constants.lattice)
        if solid is not None:
            mark(occupancy, solid)
        displacement, state = motion(key, NO_TURN, pose, displacement, state, occupancy)
        pose = next_pose(pose, torch.zeros(1, 2), displacement)
        poses.append(pose)
    return torch.cat(poses)


def mark(occupancy: Occupancy, nodes: list) -> None:
    """Certain evidence that the nodes with these centres are solid and all others over the ground free."""
    points, weight = occupancy.evidence.unflatten(1, (2, POINTS**3)).unbind(1)
    weight[...] = 1.0
    height = occupancy.lowest[0, 1] + torch.arange(2 * REACH + 1)
    points[...] = torch.where(height < 0.49, 1.0, -1.0)[:, None]
    for centre in nodes:
        index = (torch.tensor(centre) - occupancy.lowest[0]).floor().long()
        if all(0 <= i < 2 * REACH + 1 for i in index.tolist()):
            x, y, z = index.tolist()
            points[0, :, x, y, z] = 1.0


def test_it_stays_exactly_where_it_is_without_keys(motion):
    poses = play(motion, [NO_KEY] * 20)
    assert torch.equal(poses, poses[:1].expand_as(poses))


def test_it_walks_and_stops_exactly(motion):
    for yaw in (0.0, 37.0, 200.0):
        poses = play(motion, [FORWARD] * 12 + [NO_KEY] * 8, yaw)
        step = displacement_between(poses[:-1], poses[1:])
        assert step[8, 2] == pytest.approx(motion.constants.walk_speed * STEP, abs=1e-4)
        assert step[:, :2].abs().max() < 1e-4
        assert torch.equal(poses[-1], poses[-4])


def test_evidence_of_a_wall_stops_it(motion):
    wall = [(x, y, 3.0) for x in (-1.0, 0.0, 1.0) for y in (1.0, 2.0)]
    poses = play(motion, [FORWARD] * 20, solid=wall)
    assert poses[-1, 2] == pytest.approx(2.5 - motion.constants.half_width, abs=1e-3)
    assert play(motion, [FORWARD] * 20, solid=[])[-1, 2] > 4


def test_it_does_not_walk_into_what_it_sees_straight_ahead(motion):
    """Although the map knows of no obstacle."""
    pose, displacement, state = (
        torch.tensor([[0.0, 0.5, 0.0, 30.0, 0.0]]),
        torch.zeros(1, 3),
        motion.init_state(1),
    )
    wall, steps = 1.5, []
    for _ in range(20):
        gone = from_world(pose[:, :3] - torch.tensor([[0.0, 0.5, 0.0]]), pose[:, 3])[0, 2]
        displacement, state = motion(FORWARD, NO_TURN, pose, displacement, state, None, (wall - gone)[None])
        pose = next_pose(pose, torch.zeros(1, 2), displacement)
        steps.append(displacement)
    walked = torch.cat(steps)
    assert walked[:, 2].sum().item() == pytest.approx(wall - CLEARANCE, abs=1e-4)
    assert walked[-5:].abs().max() < 1e-5 and walked[:, :2].abs().max() < 1e-5
    # It may walk away.
    away, _ = motion(-FORWARD, NO_TURN, pose, displacement, state, None, torch.tensor([torch.inf]))
    assert away[0, 2] < -0.01
    assert motion.heading(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([5.0])).item() == pytest.approx(95.0)
    motion.sees_nodes.zero_()  # data without poses: nothing is known of what blocks
    blind, _ = motion(FORWARD, NO_TURN, pose, displacement, state, None, torch.tensor([0.1]))
    assert blind[0, 2] > 0.01


def test_a_jump_goes_up_and_comes_down(motion):
    for solid in ([], None):  # also where nothing is known
        height = play(motion, [JUMP] * 2 + [NO_KEY] * 18, solid=solid)[:, 1] - 0.5
        assert 0.9 < height.max() < 1.2 and height[-1] == 0


def test_a_fall_ends_at_the_floor_where_no_node_is_seen(motion):
    """Evidence that all is free, as of dark pictures, under a player that walks off an edge."""

    def step(pose, displacement, state, ground=None):
        occupancy = Occupancy.unknown(pose[:, :3], motion.constants.lattice)
        points, weight = occupancy.evidence.unflatten(1, (2, POINTS**3)).unbind(1)
        weight[...], points[...] = 1.0, -1.0
        if ground is not None:
            height = occupancy.lowest[0, 1] + torch.arange(2 * REACH + 1)
            points[...] = torch.where(height < ground - 0.01, 1.0, -1.0)[:, None]
        displacement, state = motion(FORWARD, NO_TURN, pose, displacement, state, occupancy)
        return next_pose(pose, torch.zeros(1, 2), displacement), displacement, state

    now = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0]]), torch.zeros(1, 3), motion.init_state(1)
    heights = []
    for _ in range(40):
        now = step(*now)
        heights.append(now[0][0, 1].item())
    assert heights[4] > 0.5 - MAX_FALL and heights == sorted(heights, reverse=True)
    assert heights[-20:] == pytest.approx([0.5 - MAX_FALL] * 20, abs=1e-4)
    assert now[0][0, 2] > 6 and now[2][0, 6] == 1  # walks on, and stands
    for _ in range(20):  # where there are nodes, they carry the player, and the floor is under them
        now = step(*now, ground=0.5 - MAX_FALL)
    assert now[0][0, 1].item() == pytest.approx(0.5 - MAX_FALL, abs=1e-4)
    for _ in range(40):
        now = step(*now)
    assert now[0][0, 1].item() == pytest.approx(0.5 - 2 * MAX_FALL, abs=1e-4)


def test_a_recorded_fall_may_be_deeper(motion):
    """The context's last frames are below the floor: the player goes on from there."""
    pose, state = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0]]), motion.init_state(1)
    _, state = motion(NO_KEY, NO_TURN, pose, torch.zeros(1, 3), state)
    fallen, still = pose - torch.tensor([[0.0, 9.0, 0.0, 0.0, 0.0]]), torch.zeros(1, 3)
    for _ in range(3):
        moved, state = motion(NO_KEY, NO_TURN, fallen, still, state)
        fallen = next_pose(fallen, torch.zeros(1, 2), moved)
    assert fallen[0, 1].item() == pytest.approx(-8.5, abs=0.1)


def test_the_velocity_follows_the_true_displacement(motion):
    """In a recorded context the player falls or walks before the model has predicted anything."""
    pose, moved = torch.tensor([[0.0, 3.7, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, -0.3, 0.2]])
    found, state = motion(NO_KEY, NO_TURN, pose, moved, motion.init_state(1))
    assert found[0, 1] < -0.3 and 0 < found[0, 2] < 0.2
    assert state.shape == (1, STATE) and state[0, 6] == 0


def test_it_is_deterministic_and_players_do_not_mix(motion):
    poses = torch.tensor([[0.0, 0.5, 0.0, 20.0, 0.0], [5.3, 0.5, 1.0, 20.0, 0.0]])
    keys, moved = torch.cat([FORWARD, JUMP]), torch.zeros(2, 3)
    both, state = motion(keys, torch.zeros(2), poses, moved, motion.init_state(2))
    again, _ = motion(keys, torch.zeros(2), poses, moved, motion.init_state(2))
    assert torch.equal(both, again)
    alone, alone_state = motion(keys[:1], NO_TURN, poses[:1], moved[:1], motion.init_state(1))
    assert torch.allclose(both[:1], alone) and torch.allclose(state[:1], alone_state)


def test_the_constants_are_in_the_checkpoint(motion):
    motion.constants = type(motion.constants)(walk_speed=5.0)
    other = PlayerMotion()
    other.load_state_dict(motion.state_dict())
    assert other.constants.walk_speed == 5.0


def test_displacements_turn_with_the_yaw():
    step, yaw = torch.randn(6, 3), torch.rand(6) * 360
    assert torch.allclose(from_world(to_world(step, yaw), yaw), step, atol=1e-5)
    pose = torch.cat([torch.randn(6, 3), yaw[:, None], torch.zeros(6, 1)], 1)
    after = next_pose(pose, torch.zeros(6, 2), step)
    assert torch.allclose(after[:, :3] - pose[:, :3], to_world(step, yaw), atol=1e-5)
