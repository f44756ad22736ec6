"""The z-buffer warp: occlusion, disocclusion, and agreement with projective geometry."""

import torch

from geometry import camera
from geometry.zbuffer import close_cracks, splat_inverse_ray_distance, warp_by_zbuffer

H, W, FOV = 36, 64, 70.0


def wall(axial_depth: float) -> torch.Tensor:
    """Inverse ray distances [1, H, W] of a wall across the view at an axial depth in metres."""
    return (camera.rays(H, W, FOV)[..., 2] / axial_depth)[None]


def pose(x: float = 0.0, z: float = 0.0, yaw: float = 0.0, pitch: float = 0.0) -> torch.Tensor:
    return torch.tensor([[x, 0.0, z, yaw, pitch]])


def warp(inverse, pose_from, pose_to):
    return warp_by_zbuffer(inverse, pose_from, pose_to, torch.full_like(inverse, 0.01), FOV)


def test_same_pose_changes_nothing():
    inverse = wall(5.0)
    view, grid, visible = warp(inverse, pose(pitch=10.0, yaw=30.0), pose(pitch=10.0, yaw=30.0))
    torch.testing.assert_close(view, inverse, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grid[0].movedim(-1, 0), camera.identity_grid(H, W), rtol=0, atol=1e-4)
    assert visible[:, 1:-1, 1:-1].all()


def test_walking_towards_a_wall():
    """Yaw 0 looks along +z in Minecraft's convention: 4 of 10 metres are left after 6."""
    view, _, visible = warp(wall(10.0), pose(), pose(z=6.0))
    middle = slice(H // 4, -H // 4), slice(W // 4, -W // 4)
    assert visible[0][middle].all()
    torch.testing.assert_close(view[0][middle], wall(4.0)[0][middle], rtol=0.04, atol=0)


def test_turning_agrees_with_the_homography():
    """A turn alone moves each ray by the homography, whatever the depth."""
    inverse = 0.05 + 0.4 * torch.rand(1, H, W, generator=torch.Generator().manual_seed(0))
    to = pose(yaw=12.0, pitch=-5.0)
    _, grid, visible = warp(inverse, pose(pitch=3.0), to)
    expected, inside = camera.reproject(pose(pitch=3.0), to, 0.0, H, W, FOV)
    assert not (visible & ~inside).any() and visible.sum() > 0.95 * inside.sum()
    torch.testing.assert_close(grid[visible], expected[visible], rtol=0, atol=1e-4)


def test_near_surface_occludes_and_uncovers_what_is_behind():
    """A post 2 m away before a wall at 10 m; the camera steps 0.5 m to the right (-x in Minecraft)."""
    inverse = wall(10.0).clone()
    post = slice(W // 2 - 3, W // 2 + 3)
    inverse[0, :, post] = wall(2.0)[0, :, post]
    view, _, visible = warp(inverse, pose(), pose(x=-0.5))
    row = view[0, H // 2]
    near = row > 0.3
    # f = 25.7 pixels: the post moves by 0.5 / 2 * f = 6.4 pixels to the left, the wall by 1.3.
    assert abs(near.nonzero().float().mean().item() - (W / 2 - 0.5 - 6.4)) < 0.6
    hidden = ~visible[0, H // 2]
    uncovered = hidden.nonzero()[:, 0]
    inside = uncovered[(uncovered > 8) & (uncovered < W - 8)]
    assert 3 <= len(inside) <= 6, "the strip between the post's old and new right edge, less the wall's shift"
    assert (inside > near.nonzero().max()).all(), "right of the post"


def test_batch_is_each_alone():
    generator = torch.Generator().manual_seed(1)
    inverse = 0.05 + torch.rand(3, H, W, generator=generator)
    a = torch.cat([pose(), pose(yaw=20.0, pitch=8.0), pose(x=3.0, z=-2.0)])
    b = torch.cat([pose(z=0.5), pose(x=0.2, yaw=25.0), pose(x=3.0, z=-1.0, yaw=-9.0)])
    whole = splat_inverse_ray_distance(inverse, a, b, FOV)
    for i in range(3):
        each = slice(i, i + 1)
        assert torch.equal(whole[each], splat_inverse_ray_distance(inverse[each], a[each], b[each], FOV))


def test_infinite_distance_stays_infinite():
    splatted = splat_inverse_ray_distance(torch.zeros(1, H, W), pose(), pose(x=1.0, yaw=5.0), FOV)
    assert (splatted == 0).all()


def test_only_narrow_gaps_are_closed():
    splatted = wall(5.0).clone()
    splatted[0, :, 20] = 0  # a crack
    splatted[0, :, 40:50] = 0  # a hole
    closed = close_cracks(splatted)
    assert (closed[0, :, 20] > 0).all() and (closed[0, :, 42:48] == 0).all()
    torch.testing.assert_close(closed[0, 5:-5, 20], wall(5.0)[0, 5:-5, 20], rtol=0.05, atol=0)
