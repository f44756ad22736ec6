"""Keyframes: what is written, what is chosen, and that a view is drawn from them as geometry says."""

import torch

from geometry import camera, warping
from geometry.keyframes import Keyframes
from geometry.warping import Source

H, W = 9, 16
FOV = 70.0


def source(*yaws: float, code: int = 0, place: float = 0.0) -> Source:
    """Frames of a far wall at these yaws, of random colours and codes."""
    n = len(yaws)
    torch.manual_seed(code)
    pose = torch.zeros(n, 5)
    pose[:, 3], pose[:, 2] = torch.tensor(yaws), place
    return Source(
        torch.rand(n, 3, 4 * H, 4 * W),
        torch.randint(64, (n, H, W)),
        torch.full((n, 2 * H, 2 * W), 0.01),
        pose,
    )


def written(*frames: Source, places: int = 4) -> Keyframes:
    """One world that has kept these frames, in turn."""
    found = Keyframes.empty(1, places, (4 * H, 4 * W), (H, W))
    for frame in frames:
        found = found.write(torch.tensor([True]), frame, torch.zeros(1))
    return found


def test_a_view_from_the_same_pose_is_the_frame_itself():
    frame = source(30.0)
    seen = warping.warp_view(frame, frame.pose, torch.full((1, 2 * H, 2 * W), 0.05), FOV)
    torch.testing.assert_close(seen.picture, frame.picture, atol=1e-3, rtol=0)
    assert torch.equal(seen.tokens, frame.tokens)
    assert seen.exact.min() > 0.99 and seen.mask.min() == 1 and seen.distance.max() == 0


def test_a_turn_uncovers_one_side_and_moves_what_stays():
    frame, to = source(0.0), torch.tensor([[0.0, 0.0, 0.0, 20.0, 0.0]])
    seen = warping.warp_view(frame, to, torch.full((1, 2 * H, 2 * W), 0.05), FOV)
    assert (seen.mask[0, :, 0] == 1).all() and (seen.mask[0, :, -1] == 0).all(), (
        "turning right uncovers there"
    )
    grid, _ = camera.reproject(frame.pose, to, 0.0, 4 * H, 4 * W, FOV)
    expected = camera.warp(frame.picture, grid)
    torch.testing.assert_close(seen.picture[..., 4:-4, 4:40], expected[..., 4:-4, 4:40], atol=0.06, rtol=0)
    assert seen.exact.max() <= 1 and seen.exact.mean() < 0.9, "most cells are resampled"


def test_walking_up_to_a_wall_enlarges_it():
    """A wall across the view at 10 metres, seen from 5: half a cell of the old picture, by length, fills one.
    Minecraft's yaw 0 looks along +z."""
    frame = source(0.0)
    rays = camera.rays(2 * H, 2 * W, FOV)[..., 2]  # the share of a ray's length that goes forward
    frame.inverse = (rays / 10.0)[None]
    to = torch.tensor([[0.0, 0.0, 5.0, 0.0, 0.0]])
    near = warping.warp_view(frame, to, (rays / 5.0)[None], FOV)
    middle = near.source_scale[0, 2:-2, 2:-2]
    torch.testing.assert_close(middle, torch.full_like(middle, 0.5), atol=0.03, rtol=0)
    same = warping.warp_view(frame, frame.pose, frame.inverse, FOV)
    torch.testing.assert_close(same.source_scale, torch.ones(1, H, W), atol=1e-3, rtol=0)


def test_writing_keeps_the_newest_and_changes_nothing_in_place():
    one = written(source(0.0), places=2)
    two = one.write(torch.tensor([True]), source(90.0), torch.ones(1))
    three = two.write(torch.tensor([True]), source(180.0), torch.zeros(1))
    assert one.written.tolist() == [[1, 0]] and two.written.tolist() == [[1, 2]]
    assert three.pose[0, :, 3].tolist() == [180.0, 90.0], "the oldest makes room"
    assert three.generation.tolist() == [[0, 1]]
    assert two.write(torch.tensor([False]), source(7.0), torch.zeros(1)) is two
    metres, degrees = three.away(torch.tensor([[0.0, 3.0, 4.0, -170.0, 0.0]]))
    assert metres.item() == 5 and degrees.item() == 10
    assert Keyframes.empty(1, 2, (4 * H, 4 * W), (H, W)).away(torch.zeros(1, 5))[0].item() == torch.inf


def test_the_keyframes_that_show_the_view_are_chosen():
    kept = written(source(0.0), source(90.0), source(30.0), source(0.0, place=50.0))
    flat = torch.full((1, 4, 8), 0.01)
    places, worth = kept.choose(torch.tensor([[0.0, 0.0, 0.0, 40.0, 0.0]]), flat, 3, FOV)
    assert places[0, 0] == 2, "the nearest view first"
    assert places[0, 1] == 1, "then the one that adds most"
    assert (worth > 0).all()
    nothing = Keyframes.empty(1, 4, (4 * H, 4 * W), (H, W))
    assert nothing.choose(torch.zeros(1, 5), flat, 2, FOV)[1].max() == 0
    # What was observed is worth more than what was generated from the same place.
    generated = kept.write(torch.tensor([True]), source(40.0), torch.full((1,), 3.0))
    places, _ = generated.choose(torch.tensor([[0.0, 0.0, 0.0, 40.0, 0.0]]), flat, 2, FOV)
    assert generated.generation[0, places[0, 0]] == 0 and generated.pose[0, places[0, 0], 3] == 30


def test_each_cell_is_taken_from_the_best_drawing():
    left, right = source(-40.0, code=1), source(40.0, code=2)
    kept = written(left, right)
    to = torch.zeros(1, 5)
    places, worth = kept.choose(to, torch.full((1, 4, 8), 0.01), 2, FOV)
    drawn = warping.warp_view(kept.source(places), to.repeat(2, 1), torch.full((2, 2 * H, 2 * W), 0.01), FOV)
    whole = warping.compose(drawn, worth, kept.generation.gather(1, places))
    each = drawn.mask.view(2, H, W)
    torch.testing.assert_close(whole.mask[0], each.amax(0))
    for edge in (0, -1):
        best = each[:, 4, edge].argmax()
        assert whole.tokens[0, 4, edge] == drawn.tokens[best, 4, edge]
        torch.testing.assert_close(
            whole.picture[0, :, 16:20, edge * 4 or 0], drawn.picture[best, :, 16:20, edge * 4 or 0]
        )
