"""Composed views: what each source shows of them, occlusion, votes, and which source wins."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from geometry import camera, warping
from geometry.warping import ComposedView, SourceFrames, compose_view

H, W = 9, 16  # cells; two inverse ray distances and four pixels in each, to each side
FOV = 70.0
RAYS = camera.rays(2 * H, 2 * W, FOV)[..., 2]  # axial depth at ray distance 1
FALLBACK = torch.full((1, 2 * H, 2 * W), 0.05)


def pose(x: float = 0.0, y: float = 0.0, z: float = 0.0, yaw: float = 0.0) -> torch.Tensor:
    """[1, 5] in Minecraft's convention: yaw 0 looks along +z, and right is -x."""
    return torch.tensor([[x, y, z, yaw, 0.0]])


def wall(metres: float) -> torch.Tensor:
    """Inverse ray distances [2H, 2W] of a wall across the view, at this axial depth."""
    return RAYS / metres


def frame(
    at: torch.Tensor, inverse: torch.Tensor, colour: float | None = None, code: int = 0
) -> SourceFrames:
    """A frame of random pixels and codes, or of one colour and code."""
    generator = torch.Generator().manual_seed(code)
    picture = torch.rand(1, 3, 4 * H, 4 * W, generator=generator)
    tokens = torch.randint(64, (1, H, W), generator=generator)
    if colour is not None:
        picture, tokens = torch.full_like(picture, colour), torch.full_like(tokens, code)
    return SourceFrames(picture, tokens, inverse[None].clone(), at, torch.ones(1, H, W))


def compose(to: torch.Tensor, *sources: SourceFrames, usable=None, penalty=None) -> ComposedView:
    """One view of these sources."""
    usable = torch.ones(1, len(sources), dtype=torch.bool) if usable is None else torch.tensor([usable])
    penalty = torch.zeros(1, len(sources)) if penalty is None else torch.tensor([penalty])
    return compose_view(SourceFrames.cat(*sources), usable, penalty, to, FALLBACK, FOV)


# ---------------------------------------------------------------- one source


def test_view_from_the_same_pose_is_the_frame_itself():
    source = frame(pose(1, 2, 3, 30), 0.01 + torch.rand(2 * H, 2 * W))
    view = compose(source.pose, source)
    torch.testing.assert_close(view.picture, source.picture, atol=1e-3, rtol=0)
    assert torch.equal(view.tokens, source.tokens)
    torch.testing.assert_close(view.inverse_ray_distance, source.inverse_ray_distance, atol=1e-4, rtol=1e-3)
    assert view.exact.min() > 0.99 and view.visible_mask.min() == 1 and view.visible_pixels.all()
    torch.testing.assert_close(view.resolution, torch.ones(1, H, W), atol=1e-3, rtol=0)
    assert view.disagreement.max() == 0
    cells = camera.identity_grid(H, W, torch.device("cpu")).movedim(0, -1)[None]
    torch.testing.assert_close(view.source_grid, cells, atol=1e-3, rtol=0)


def test_turn_disoccludes_one_side_and_moves_the_rest():
    source, to = frame(pose(), wall(100.0)), pose(yaw=20)
    view = compose(to, source)
    assert (view.visible_mask[0, :, 0] == 1).all()
    assert (view.visible_mask[0, :, -1] == 0).all(), "a turn to the right disoccludes the right side"
    assert torch.equal(view.inverse_ray_distance[..., -1], FALLBACK[..., -1]), "the fallback is there"
    grid, _ = camera.reproject(source.pose, to, 0.0, 4 * H, 4 * W, FOV)
    expected = F.grid_sample(source.picture, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    torch.testing.assert_close(view.picture[..., 4:-4, 4:40], expected[..., 4:-4, 4:40], atol=0.06, rtol=0)
    assert view.exact.max() <= 1 and view.exact.mean() < 0.9, "most cells are resampled"


def test_whole_shift_keeps_the_codes():
    """A step to the side before a wall shifts the picture by exactly two cells, so nothing is resampled."""
    metres = 5.0
    focal = camera.focal_length(2 * H, FOV)
    source = frame(pose(), wall(metres))
    view = compose(pose(x=-4 * metres / focal), source)  # to the right: the picture moves to the left
    inner = (slice(0, 1), slice(0, H), slice(0, W - 3))
    assert view.exact[inner].min() > 0.9
    assert torch.equal(view.tokens[inner], source.tokens[..., 2:][inner])
    assert view.visible_mask[..., -2:].max() == 0
    half = compose(pose(x=-3 * metres / focal), source)
    assert half.exact.max() < 0.1, "one and a half cells"


def test_walking_up_to_a_wall_magnifies_it():
    """From 10 metres to 5: two view cells per source cell, by length."""
    near = compose(pose(z=5), frame(pose(), wall(10.0)))
    middle = near.resolution[0, 2:-2, 2:-2]
    torch.testing.assert_close(middle, torch.full_like(middle, 0.5), atol=0.03, rtol=0)
    assert near.visible_mask.min() == 1, "without cracks"
    torch.testing.assert_close(near.inverse_ray_distance[0], wall(5.0), atol=0.01, rtol=0.05)
    away = compose(pose(z=-5), frame(pose(), wall(5.0)))
    assert away.resolution[0, H // 2, W // 2].item() == pytest.approx(2.0, abs=0.1)
    assert away.visible_mask[0, 0].max() == 0, "its surroundings come into view"


def test_resolution_is_lost_over_all_warps():
    """A source that was magnified twice before is magnified twice again; the sharper source wins."""
    soft = replace(frame(pose(), wall(10.0), code=1), resolution=torch.full((1, H, W), 0.5))
    middle = compose(pose(z=5), soft).resolution[0, 2:-2, 2:-2]
    torch.testing.assert_close(middle, torch.full_like(middle, 0.25), atol=0.02, rtol=0)
    sharp = frame(pose(), wall(10.0), code=2)
    assert (compose(pose(z=5), soft, sharp).source == 1).all()
    assert (compose(pose(z=5), sharp, soft).source == 0).all()


def test_a_source_is_read_without_its_neighbours_in_memory():
    """A little up and down: the rows at the borders are those of the source alone."""
    dark, light = frame(pose(), wall(8.0), colour=0.3), frame(pose(), wall(8.0), colour=0.7)
    for height in (-0.1, 0.1):
        for first, second in ((dark, light), (light, dark)):
            view = compose(pose(y=height), first, second, penalty=[0.0, 9.0])
            assert (view.source == 0).all()
            torch.testing.assert_close(view.picture, first.picture)


def test_near_box_hides_the_wall_and_its_shadow_is_disoccluded():
    """A step to the right: the box at 2 metres moves left by 6.4 columns, the wall at 10 metres by 1.3."""
    inverse = wall(10.0).clone()
    inverse[:, 12:20] = wall(2.0)[:, 12:20]
    source = frame(pose(), inverse)
    source.tokens[:] = 2
    source.tokens[..., 6:10] = 1
    source.picture[:] = 0.2
    source.picture[..., 24:40] = 0.8
    view = compose(pose(x=-1), source)
    middle = view.inverse_ray_distance[0, H]  # one row
    box = middle > 0.25
    assert box.nonzero().flatten().tolist() == list(range(5, 14)), "8 columns, and one by rounding"
    visible = view.visible_pixels[0, H]
    assert not visible[14:18].any(), "the shadow of the box"
    assert visible[:14].all() and visible[20:29].all()
    assert (view.tokens[0, H // 2, 3:6] == 1).all() and (view.tokens[0, H // 2, 9:14] == 2).all()
    shown = view.picture[0, 0, 2 * H]
    assert (shown[12:26] > 0.7).all(), "the box hides the wall behind it"
    assert shown[:10].max() < 0.3 and shown[40:].max() < 0.3
    assert middle[15:18].tolist() == FALLBACK[0, H, 15:18].tolist()


# ---------------------------------------------------------------- several sources


def test_point_that_other_sources_see_through_is_discarded(monkeypatch):
    """One source has an error in its depth: a patch of its wall is at 1 metre."""
    wrong = wall(10.0).clone()
    wrong[6:10, 14:18] = wall(1.0)[6:10, 14:18]
    aside = 4 / camera.focal_length(2 * H, FOV)  # moves the patch by 4 columns: votes are on every second one
    sources = (
        frame(pose(x=-aside), wrong, 0.9, code=1),
        frame(pose(x=aside), wall(10.0), 0.1, code=2),
        frame(pose(y=0.125), wall(10.0), 0.2, code=3),
    )
    view = compose(pose(), *sources)
    torch.testing.assert_close(view.inverse_ray_distance[0], wall(10.0), atol=2e-3, rtol=0.02)
    patch = torch.zeros(1, H, W)
    patch[:, 3:5, 9:11] = 1
    assert torch.equal(view.disagreement, patch)
    alone = compose(pose(), sources[0])
    assert alone.inverse_ray_distance.max() > 0.9 and alone.disagreement.max() == 0, "nobody contradicts it"
    # Without the vote the point would hide the wall.
    monkeypatch.setattr(warping, "contradicted_points", lambda points, *_: torch.zeros_like(points).bool())
    unchecked = compose(pose(), *sources)
    assert unchecked.inverse_ray_distance.max() > 0.9
    assert (unchecked.tokens[patch > 0] == 1).all() and (view.tokens[patch > 0] != 1).all()


def test_box_that_two_of_three_sources_see_is_kept():
    box = wall(10.0).clone()
    box[7:11, 14:18] = wall(2.0)[7:11, 14:18]
    blind = frame(pose(y=-0.125), wall(10.0), 0.1, code=1)  # its network missed the box
    same = (frame(pose(), box, 0.8, code=2), frame(pose(y=0.0625), box, 0.9, code=3))
    view = compose(pose(), blind, *same)
    assert view.inverse_ray_distance[0, 8:10, 15:17].min() > 0.4
    assert (view.tokens[0, 4, 7:9] == 2).all()


@pytest.mark.parametrize("near_first", [True, False])
def test_source_with_the_least_parallax_wins(near_first):
    near, far = frame(pose(x=0.125), wall(8.0), code=1), frame(pose(x=1.0), wall(8.0), code=2)
    view = compose(pose(), *((near, far) if near_first else (far, near)))
    shown = view.source[..., :-1]  # the last column may lie outside the near one
    assert (shown == (0 if near_first else 1)).all()
    assert torch.equal(view.tokens[..., 1:-1], compose(pose(), near).tokens[..., 1:-1])
    torch.testing.assert_close(view.picture[..., :-8], compose(pose(), near).picture[..., :-8])


def test_among_equal_parallax_the_least_magnified_wins_and_a_penalty_outweighs_it():
    behind, ahead = frame(pose(z=-1), wall(4.0), code=1), frame(pose(z=1), wall(2.0), code=2)
    view = compose(pose(), behind, ahead)  # the wall is 3 metres away
    assert (view.source[0, 3:6, 5:11] == 1).all() and (view.source[0, 0] == 0).all(), (
        "it shows the middle only"
    )
    assert view.resolution[0, 4, 8] > 1.4 and view.resolution[0, 0, 8] < 0.8
    assert (compose(pose(), behind, ahead, penalty=[0.0, 0.2]).source[0, 4, 7:9] == 1).all()
    assert (compose(pose(), behind, ahead, penalty=[0.0, 0.3]).source == 0).all()


def test_each_side_comes_from_the_source_that_shows_it():
    left, right = frame(pose(yaw=-40), wall(50.0), code=1), frame(pose(yaw=40), wall(50.0), code=2)
    view = compose(pose(), left, right)
    for side, index, source in ((slice(0, 4), 0, left), (slice(-4, None), 1, right)):
        alone = compose(pose(), source)
        assert (view.source[..., side] == index).all() and alone.visible_mask[..., side].min() == 1
        assert torch.equal(view.tokens[..., side], alone.tokens[..., side])
        pixels = slice(0, 14) if index == 0 else slice(-14, None)
        torch.testing.assert_close(view.picture[..., pixels], alone.picture[..., pixels])
    assert view.visible_mask.mean() > compose(pose(), left).visible_mask.mean()


def test_sources_that_may_not_be_used_have_no_effect():
    """Also not by their vote: an empty keyframe's inverse distances are 0, so it sees through everything."""
    good = frame(pose(x=0.5), wall(8.0), code=1), frame(pose(x=-0.5), wall(8.0), code=2)
    empty = frame(pose(), torch.zeros(2 * H, 2 * W), code=3)
    whole = compose(pose(), *good)
    view = compose(pose(), *good, empty, replace(good[0], pose=pose()), usable=[True, True, False, False])
    for f in fields(ComposedView):
        torch.testing.assert_close(getattr(view, f.name), getattr(whole, f.name), msg=f.name)
    nothing = compose(pose(), *good, usable=[False, False])
    assert not nothing.visible_pixels.any() and torch.equal(nothing.inverse_ray_distance, FALLBACK)


# ---------------------------------------------------------------- invariances


def scene(seed: int, origin: float = 0.0) -> tuple[SourceFrames, torch.Tensor]:
    """Three sources of a rough wall with poses that float32 represents exactly, and a view between them.

    The first one has a patch that is too near.
    """
    generator = torch.Generator().manual_seed(seed)
    eighths = torch.randint(-8, 9, (4, 5), generator=generator).float()
    poses = eighths / 16
    poses[:, 3:] = 2 * eighths[:, 3:]
    poses[:, 2] += origin
    rough = [wall(6.0) * (1 + 0.2 * torch.rand(2 * H, 2 * W, generator=generator)) for _ in range(3)]
    rough[0][4:12, 12:20] = 0.5
    parts = [frame(poses[i : i + 1], rough[i], code=seed + i) for i in range(3)]
    return SourceFrames.cat(*parts), poses[3:]


def test_batch_is_each_view_alone():
    scenes = [scene(1), scene(5)]
    usable = torch.tensor([[True, True, True], [True, False, True]])
    penalty = torch.tensor([[0.0, 0.1, 0.2], [0.3, 0.0, 0.0]])
    together = compose_view(
        SourceFrames.cat(*(s for s, _ in scenes)),
        usable,
        penalty,
        torch.cat([to for _, to in scenes]),
        FALLBACK.repeat(2, 1, 1),
        FOV,
    )
    for i, (sources, to) in enumerate(scenes):
        alone = compose_view(sources, usable[i : i + 1], penalty[i : i + 1], to, FALLBACK, FOV)
        assert alone.visible_pixels.float().mean() > 0.5 and len(alone.source.unique()) > 1
        for f in fields(ComposedView):
            torch.testing.assert_close(
                getattr(together, f.name)[i : i + 1], getattr(alone, f.name), msg=f.name
            )


def test_view_does_not_depend_on_the_origin():
    """Far from the origin float32 positions are coarse, so only differences of poses may enter."""
    usable, penalty = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3)
    views = [
        compose_view(*scene(3, origin)[:1], usable, penalty, scene(3, origin)[1], FALLBACK, FOV)
        for origin in (0.0, 65536.0)
    ]
    assert views[0].disagreement.max() > 0, "votes are cast"
    for f in fields(ComposedView):
        torch.testing.assert_close(getattr(views[0], f.name), getattr(views[1], f.name), msg=f.name)
