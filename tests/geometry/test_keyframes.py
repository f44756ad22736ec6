"""Keyframes and warping: what is written, what is selected, and that views are warped as geometry says."""

import torch

from geometry import camera
from geometry.keyframes import Keyframes
from geometry.warping import SourceFrames, fuse_views, warp_view

H, W = 9, 16
FOV = 70.0


def frames(*yaws: float, code: int = 0, z: float = 0.0) -> SourceFrames:
    """Frames of a far wall at these yaws, with random colours and codes."""
    n = len(yaws)
    torch.manual_seed(code)
    pose = torch.zeros(n, 5)
    pose[:, 3], pose[:, 2] = torch.tensor(yaws), z
    return SourceFrames(
        torch.rand(n, 3, 4 * H, 4 * W),
        torch.randint(64, (n, H, W)),
        torch.full((n, 2 * H, 2 * W), 0.01),
        pose,
    )


def memory_of(*written: SourceFrames, capacity: int = 4) -> Keyframes:
    """The memory of one world after these frames were written one by one."""
    keyframes = Keyframes.empty(1, capacity, (4 * H, 4 * W), (H, W))
    for frame in written:
        keyframes = keyframes.write(torch.tensor([True]), frame, torch.zeros(1))
    return keyframes


def test_view_from_the_same_pose_is_the_frame_itself():
    frame = frames(30.0)
    view = warp_view(frame, frame.pose, torch.full((1, 2 * H, 2 * W), 0.05), FOV)
    torch.testing.assert_close(view.picture, frame.picture, atol=1e-3, rtol=0)
    assert torch.equal(view.tokens, frame.tokens)
    assert view.exact.min() > 0.99 and view.visible_mask.min() == 1 and view.baseline.max() == 0


def test_turn_disoccludes_one_side_and_moves_the_rest():
    frame, to = frames(0.0), torch.tensor([[0.0, 0.0, 0.0, 20.0, 0.0]])
    view = warp_view(frame, to, torch.full((1, 2 * H, 2 * W), 0.05), FOV)
    assert (view.visible_mask[0, :, 0] == 1).all()
    assert (view.visible_mask[0, :, -1] == 0).all(), "a turn to the right disoccludes the right side"
    grid, _ = camera.reproject(frame.pose, to, 0.0, 4 * H, 4 * W, FOV)
    expected = camera.warp(frame.picture, grid)
    torch.testing.assert_close(view.picture[..., 4:-4, 4:40], expected[..., 4:-4, 4:40], atol=0.06, rtol=0)
    assert view.exact.max() <= 1 and view.exact.mean() < 0.9, "most cells are resampled"


def test_walking_up_to_a_wall_magnifies_it():
    """A wall across the view at 10 metres, seen from 5 metres: two view cells per source cell, by length.

    Minecraft's yaw 0 looks along +z.
    """
    frame = frames(0.0)
    rays = camera.rays(2 * H, 2 * W, FOV)[..., 2]  # axial depth of a point at ray distance 1
    frame.inverse_ray_distance = (rays / 10.0)[None]
    to = torch.tensor([[0.0, 0.0, 5.0, 0.0, 0.0]])
    near = warp_view(frame, to, (rays / 5.0)[None], FOV)
    middle = near.source_scale[0, 2:-2, 2:-2]
    torch.testing.assert_close(middle, torch.full_like(middle, 0.5), atol=0.03, rtol=0)
    same = warp_view(frame, frame.pose, frame.inverse_ray_distance, FOV)
    torch.testing.assert_close(same.source_scale, torch.ones(1, H, W), atol=1e-3, rtol=0)


def test_full_memory_loses_its_oldest_keyframe_and_nothing_changes_in_place():
    one = memory_of(frames(0.0), capacity=2)
    two = one.write(torch.tensor([True]), frames(90.0), torch.ones(1))
    three = two.write(torch.tensor([True]), frames(180.0), torch.zeros(1))
    assert one.order.tolist() == [[1, 0]] and two.order.tolist() == [[1, 2]]
    assert three.pose[0, :, 3].tolist() == [180.0, 90.0]
    assert three.generation.tolist() == [[0, 1]]
    assert two.write(torch.tensor([False]), frames(7.0), torch.zeros(1)) is two


def test_distance_to_the_newest_keyframe():
    keyframes = memory_of(frames(0.0), frames(180.0))
    metres, degrees = keyframes.distance_to_newest(torch.tensor([[0.0, 3.0, 4.0, -170.0, 0.0]]))
    assert metres.item() == 5 and degrees.item() == 10
    empty = Keyframes.empty(1, 2, (4 * H, 4 * W), (H, W))
    assert empty.distance_to_newest(torch.zeros(1, 5))[0].item() == torch.inf


def test_frames_are_added_where_they_show_something_new():
    keyframes, no, yes = memory_of(frames(0.0)), torch.tensor([False]), torch.tensor([True])

    def added(frame: SourceFrames, observed: torch.Tensor, disoccluded: float) -> bool:
        after = keyframes.add_if_new(frame, torch.zeros(1), observed, torch.tensor([disoccluded]))
        return after is not keyframes

    assert not added(frames(1.0), yes, 1.0), "too near to the newest keyframe"
    assert added(frames(5.0), yes, 0.0)
    assert not added(frames(5.0), no, 0.01), "a generated frame that keyframes show already"
    assert added(frames(5.0), no, 0.2)
    assert added(frames(0.0, z=2.0), no, 0.0), "far enough"


def test_selects_the_keyframes_that_show_most_of_the_view():
    keyframes = memory_of(frames(0.0), frames(90.0), frames(30.0), frames(0.0, z=50.0))
    flat = torch.full((1, 4, 8), 0.01)
    slots, weight = keyframes.select(torch.tensor([[0.0, 0.0, 0.0, 40.0, 0.0]]), flat, 3, FOV)
    assert slots[0, 0] == 2, "the nearest view first"
    assert slots[0, 1] == 1, "then the one that adds most"
    assert (weight > 0).all()
    empty = Keyframes.empty(1, 4, (4 * H, 4 * W), (H, W))
    assert empty.select(torch.zeros(1, 5), flat, 2, FOV)[1].max() == 0
    # An observed keyframe outweighs a generated one at nearly the same pose.
    with_generated = keyframes.write(torch.tensor([True]), frames(40.0), torch.full((1,), 3.0))
    slots, _ = with_generated.select(torch.tensor([[0.0, 0.0, 0.0, 40.0, 0.0]]), flat, 2, FOV)
    assert with_generated.generation[0, slots[0, 0]] == 0
    assert with_generated.pose[0, slots[0, 0], 3] == 30


def test_selection_does_not_depend_on_the_origin():
    """Far from the world's origin float32 positions are coarse, so poses are made relative first."""
    keyframes = memory_of(frames(0.0), frames(60.0))
    far = memory_of(frames(0.0, z=4096.0), frames(60.0, z=4096.0))
    flat, to = torch.full((1, 4, 8), 0.01), torch.tensor([[0.0, 0.0, 0.0, 20.0, 0.0]])
    there = to.clone()
    there[:, 2] = 4096.0
    for a, b in zip(keyframes.select(to, flat, 2, FOV), far.select(there, flat, 2, FOV), strict=True):
        assert torch.equal(a, b)


def test_each_cell_comes_from_the_best_view():
    left, right = frames(-40.0, code=1), frames(40.0, code=2)
    keyframes = memory_of(left, right)
    to = torch.zeros(1, 5)
    slots, weight = keyframes.select(to, torch.full((1, 4, 8), 0.01), 2, FOV)
    views = warp_view(keyframes.gather(slots), to.repeat(2, 1), torch.full((2, 2 * H, 2 * W), 0.01), FOV)
    fused = fuse_views(views, weight, keyframes.generation.gather(1, slots))
    visible = views.visible_mask.view(2, H, W)
    torch.testing.assert_close(fused.visible_mask[0], visible.amax(0))
    for edge in (0, -1):
        best = visible[:, 4, edge].argmax()
        assert fused.tokens[0, 4, edge] == views.tokens[best, 4, edge]
        torch.testing.assert_close(
            fused.picture[0, :, 16:20, edge * 4 or 0], views.picture[best, :, 16:20, edge * 4 or 0]
        )
