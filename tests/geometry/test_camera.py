"""The pinhole camera: its signs, exact cases with a known answer, and the clips that come with the repo."""

import json
import math

import numpy as np
import pytest
import torch

from dataset.recordings import find_clips, gamefactory_track
from dataset.token_files import SAMPLES
from geometry import camera
from runtime.video import read_frames, resize

HEIGHT, WIDTH, FOV = 72, 128, 70.0
SIZE = (HEIGHT, WIDTH, FOV)
MIDDLE = (HEIGHT // 2, WIDTH // 2)


def ground_plane(pose: torch.Tensor) -> torch.Tensor:
    """Inverse distances of flat ground under a player of Minecraft's height."""
    return camera.ground_plane(pose, *SIZE, camera.EYE_HEIGHT, camera.FAR_RAY_DISTANCE)


def poses(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def directions(pose: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    """World directions [B, H, W, 3] of the pixels of poses [B, 5]."""
    to_world = camera.rotation(pose[:, 3].to(dtype), pose[:, 4].to(dtype))
    return torch.einsum("bij,hwj->bhwi", to_world, camera.rays(*SIZE, dtype=dtype))


def sphere_picture(pose: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] of a far sphere with a smooth texture."""
    x, y, z = directions(pose).unbind(-1)
    return (0.5 + 0.2 * (9 * x).sin() + 0.15 * (11 * y + 4 * z).cos() + 0.1 * (7 * z).sin())[:, None].float()


def ground_picture(pose: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] of a flat ground with a smooth texture, 0 above the horizon."""
    rays = directions(pose)
    here = camera.position(pose.double())[:, None, None]
    point = here + rays * (camera.EYE_HEIGHT / rays[..., 1:2].clamp(min=1e-3))
    texture = 0.5 + 0.25 * (1.5 * point[..., 0]).sin() + 0.2 * (1.1 * point[..., 2]).cos()
    return torch.where(rays[..., 1] > 0, texture, torch.zeros_like(texture))[:, None].float()


def source_offset(old: torch.Tensor, new: torch.Tensor, inverse=0.0) -> torch.Tensor:
    """[H, W, 2]: by how many pixels right and down of its place in `new` each pixel lay in `old`."""
    grid, _ = camera.reproject(old, new, inverse, *SIZE)
    same, _ = camera.reproject(old, old, 0.0, *SIZE)
    return ((grid - same)[0] * torch.tensor([WIDTH / 2, HEIGHT / 2])).detach()


def test_focal_length_and_field_of_view():
    assert camera.focal_length(72, 70.0) == pytest.approx(51.41, abs=0.01)
    assert camera.focal_length(100, 90.0) == pytest.approx(50)
    for angle in (0, 180, -5):
        with pytest.raises(ValueError, match="between 0 and 180"):
            camera.focal_length(72, angle)


def test_rays_are_unit_and_project_back_to_their_pixels():
    rays = camera.rays(*SIZE)
    assert rays.shape == (HEIGHT, WIDTH, 3)
    torch.testing.assert_close(rays.norm(dim=-1), torch.ones(HEIGHT, WIDTH))
    grid, seen = camera.project(rays * 7, *SIZE)
    picture = torch.rand(1, 3, HEIGHT, WIDTH)
    torch.testing.assert_close(camera.warp(picture, grid[None]), picture, atol=1e-4, rtol=0)
    assert seen.all() and not camera.project(-rays, *SIZE)[1].any()


def test_elevation_is_that_of_the_rays():
    pitch = torch.tensor([0.0, 25.0, -80.0])
    found = camera.elevation(pitch, 18, 32, 70.0)
    world = camera.rays(18, 32, 70.0).view(1, -1, 3) @ camera.rotation(torch.full((3,), 40.0), pitch).mT
    assert torch.allclose(found.flatten(1), -torch.rad2deg(world[..., 1].asin()), atol=1e-3)
    assert found[0, 0].min() > 20 and found[1, 8:10, 15:17].mean() == pytest.approx(-25.0, abs=0.2)


def test_rotations_are_rotations_with_the_agreed_signs():
    yaw, pitch = torch.tensor([[0.0, 90.0], [33.0, -200.0]]), torch.tensor([0.0, 45.0])
    r = camera.rotation(yaw, pitch)
    assert r.shape == (2, 2, 3, 3)
    torch.testing.assert_close(r @ r.mT, torch.eye(3).expand(2, 2, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(2, 2))
    forward = r[..., 2]
    torch.testing.assert_close(forward[0, 0], torch.tensor([0.0, 0.0, 1.0]))
    half = math.sqrt(0.5)  # to the right and down
    torch.testing.assert_close(forward[0, 1], torch.tensor([half, half, 0.0]), atol=1e-6, rtol=0)


def test_walking_along_minecrafts_forward_and_right_is_forward_and_right_in_the_camera():
    for yaw in (0.0, 37.0, -150.0, 725.0):
        s, c = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
        r = camera.rotation(torch.tensor(yaw), torch.tensor(0.0))
        for moved, axis in (((-s, 0, c), [0, 0, 1]), ((-c, 0, -s), [1, 0, 0]), ((0, 1, 0), [0, -1, 0])):
            local = r.mT @ camera.position(torch.tensor([*moved, 0.0, 0.0]))
            torch.testing.assert_close(local, torch.tensor(axis, dtype=torch.float32), atol=1e-5, rtol=0)


def test_turning_right_moves_content_left_and_looking_down_moves_it_up():
    here = poses([0, 0, 0, 20, 0])
    right = source_offset(here, poses([0, 0, 0, 25, 0]))[MIDDLE]
    assert right[0] == pytest.approx(camera.focal_length(HEIGHT, FOV) * math.tan(math.radians(5)), rel=0.02)
    down = source_offset(here, poses([0, 0, 0, 20, 5]))[MIDDLE]
    assert down[1] > 4 and abs(down[0]) < 0.1


def test_walking_forward_expands_from_the_centre_and_strafing_right_moves_content_left():
    wall = 1 / 4.0
    forward = source_offset(poses([0, 0, 0, 0, 0]), poses([0, 0, 0.5, 0, 0]), wall)
    # what is right of the centre now was nearer to the centre before, and so on all four sides
    assert forward[36, 120, 0] < -1 and forward[36, 8, 0] > 1
    assert forward[68, 64, 1] < -1 and forward[4, 64, 1] > 1
    assert forward[MIDDLE].abs().max() < 0.2
    strafe = source_offset(poses([0, 0, 0, 0, 0]), poses([-0.5, 0, 0, 0, 0]), wall)
    assert strafe[MIDDLE][0] > 1
    jump = source_offset(poses([0, 0, 0, 0, 0]), poses([0, 0.5, 0, 0, 0]), wall)
    assert jump[MIDDLE][1] < -1


def test_infinitely_far_is_the_pure_rotation_however_far_one_walks():
    old, new = poses([5, 60, -7, 350, 10]), poses([900, 70, 33, 362, -4])
    moved = camera.reproject(old, new, torch.zeros(1, HEIGHT, WIDTH), *SIZE)
    new[:, :3] = old[:, :3]
    turned = camera.reproject(old, new, 0.0, *SIZE)
    assert torch.equal(moved[0], turned[0]) and torch.equal(moved[1], turned[1])


def test_there_and_back_is_the_same_place():
    """A homography and its inverse; and a whole turn of yaw changes nothing."""
    old, new = poses([0, 0, 0, 10, -20], [0, 0, 0, 0, 30]), poses([0, 0, 0, 22, -12], [0, 0, 0, 9, 41])
    there, seen = camera.reproject(old, new, 0.0, *SIZE)
    back, _ = camera.reproject(new, old, 0.0, *SIZE)
    round_trip = camera.warp(back.permute(0, 3, 1, 2), there).permute(0, 2, 3, 1)
    same, _ = camera.reproject(old, old, 0.0, *SIZE)
    inside = seen & (there.abs() < 0.97).all(-1)
    assert inside.float().mean() > 0.5
    assert (round_trip - same)[inside].abs().max() < 2e-3
    whole = camera.reproject(old, new + poses([0, 0, 0, 360, 0]), 0.0, *SIZE)[0]
    torch.testing.assert_close(whole, there, atol=1e-4, rtol=0)


@pytest.mark.parametrize("turn", [(15, 0), (-15, 0), (0, 12), (-9, -7)])
def test_a_far_sphere_is_warped_into_what_the_turned_camera_sees(turn):
    old = poses([0, 0, 0, 30, 25])
    new = old + poses([0, 0, 0, *turn])
    grid, seen = camera.reproject(old, new, 0.0, *SIZE)
    error = (camera.warp(sphere_picture(old), grid) - sphere_picture(new)).abs()[:, 0]
    assert error[seen].max() < 0.02 and error[seen].mean() < 0.003
    assert 0.5 < seen.float().mean() < 0.95


def test_a_textured_ground_is_warped_into_what_the_walking_camera_sees():
    old = poses([100, 64, -50, 30, 25], [0, 5, 0, -80, 10])
    new = poses([99.8, 64, -49.7, 37, 22], [0.3, 5, 0.1, -80, 14])
    inverse = ground_plane(new)
    assert inverse.min() == pytest.approx(1 / camera.FAR_RAY_DISTANCE)
    grid, seen = camera.reproject(old, new, inverse, *SIZE)
    near = seen & (inverse > 1 / 8)
    truth = ground_picture(new)[:, 0]
    error = (camera.warp(ground_picture(old), grid)[:, 0] - truth).abs()[near]
    rotated = camera.warp(ground_picture(old), camera.reproject(old, new, 0.0, *SIZE)[0])[:, 0]
    assert near.float().mean() > 0.3
    assert error.mean() < 0.005 < 0.03 < (rotated - truth).abs()[near].mean()


def test_ground_distance_straight_down_is_the_eye_height():
    inverse = ground_plane(poses([0, 0, 0, 0, 90]))[0]
    assert 1 / inverse[MIDDLE] == pytest.approx(camera.EYE_HEIGHT, rel=1e-3)


def test_gradients_reach_poses_and_depths():
    old, new = poses([0, 0, 0, 0, 5]), poses([0.1, 0, 0.3, 4, 6]).requires_grad_()
    inverse = torch.full((1, HEIGHT, WIDTH), 0.2, requires_grad=True)
    grid, _ = camera.reproject(old, new, inverse, *SIZE)
    camera.warp(sphere_picture(old), grid).square().mean().backward()
    assert new.grad.abs().min() >= 0 and (new.grad[0, [0, 2, 3, 4]] != 0).all()
    assert inverse.grad.abs().sum() > 0 and torch.isfinite(inverse.grad).all()


def test_on_recorded_clips_rotation_and_ground_beat_rotation_beats_copy():
    """Pairs of the shipped clips in which the player walks on level ground and turns."""
    old, new, before, after = [], [], [], []
    for clip in find_clips(SAMPLES, "gamefactory", SAMPLES)[1]:
        _, pose = gamefactory_track(json.loads(clip.metadata.read_text())["actions"], clip.metadata)
        frames = read_frames(clip.video, wanted=range(500))
        pictures = np.stack([resize(frame, HEIGHT, WIDTH) for frame in frames])
        step = np.diff(pose[: len(pictures)], axis=0)
        walks = (np.hypot(step[:, 0], step[:, 2]) > 0.1) & (abs(step[:, 1]) < 0.05) & (abs(step[:, 3]) > 1)
        t = np.flatnonzero(walks)[:40]
        for rows, values in (
            (old, pose[t]),
            (new, pose[t + 1]),
            (before, pictures[t]),
            (after, pictures[t + 1]),
        ):
            rows.append(torch.from_numpy(values))
    old, new, before, after = (torch.cat(rows) for rows in (old, new, before, after))
    assert len(old) >= 20
    before, after = (x.permute(0, 3, 1, 2).float() / 255 for x in (before, after))

    def psnr(grid: torch.Tensor | None) -> float:
        picture = before if grid is None else camera.warp(before, grid)
        return float(-10 * (picture - after).square().mean((1, 2, 3)).log10().mean())

    copy = psnr(None)
    rotation = psnr(camera.reproject(old, new, 0.0, *SIZE)[0])
    ground = psnr(camera.reproject(old, new, ground_plane(new), *SIZE)[0])
    print(f"{len(old)} pairs: copy {copy:.1f} dB, rotation {rotation:.1f}, rotation and ground {ground:.1f}")
    assert ground > rotation + 1 and rotation > copy + 2


# ---------------------------------------------------------------- carrying


def test_cells_that_come_into_view():
    """Turning right uncovers columns on the right, walking back an edge all around; nothing where unknown."""
    here = torch.zeros(3, 5)
    to = torch.zeros(3, 5)
    to[0, 3], to[1, 2], to[2, 3] = 20.0, -1.0, torch.nan
    new = camera.disoccluded_mask(here, to, 18, 32, 70.0)
    assert new[0, :, -4:].all() and not new[0, 4:14, :20].any()
    assert new[1, -1].all() and not new[1, 8:10, 8:24].any()
    assert not new[2].any()
    assert not camera.disoccluded_mask(here, here, 18, 32, 70.0).any()


def test_distances_are_carried_with_the_camera():
    """A wall 5 m ahead, looked at straight on, after 2 m towards it and a turn."""
    wall = torch.full((1, 24, 32), 0.2) * camera.rays(24, 32, 70.0)[..., 2]  # 1 / distance along each ray
    here, to = torch.zeros(1, 5), torch.tensor([[0.0, 0.0, 2.0, 10.0, 5.0]])
    guess = torch.full((1, 24, 32), 0.1)
    found = camera.warp_inverse_ray_distance(wall, here, to, guess, 70.0, rounds=8)
    rays = camera.rays(24, 32, 70.0) @ camera.rotation(to[0, 3], to[0, 4]).T
    expected = rays[..., 2] / 3.0
    _, seen = camera.reproject(here, to, expected[None], 24, 32, 70.0)
    inner = seen[0]
    torch.testing.assert_close(found[0][inner], expected[inner], rtol=0.02, atol=0)
    two = camera.warp_inverse_ray_distance(wall, here, to, guess, 70.0)
    assert ((two[0] - expected)[inner].abs() / expected[inner]).median() < 0.05
    wall.requires_grad_()
    camera.warp_inverse_ray_distance(wall, here, to, guess, 70.0).sum().backward()
    assert wall.grad.abs().sum() > 0


def test_identity_grid_samples_every_pixel_itself():
    picture = torch.rand(1, 3, 6, 10)
    grid = camera.identity_grid(6, 10).movedim(0, -1)[None]
    torch.testing.assert_close(camera.warp(picture, grid), picture)


@pytest.mark.parametrize("pitch", [0.0, 20.0, -15.0])
def test_distance_ahead_is_that_of_a_wall_at_eye_height(pitch):
    """A wall 2 m in front of the eye, and a nearer one to the right, 40 degrees from straight ahead."""
    height, width, fov = 36, 64, 70.0
    directions = camera.rays(height, width, fov)
    tilt = camera.rotation(torch.zeros(1), torch.tensor([pitch]))[0]
    level = directions @ tilt.T
    yaw = torch.rad2deg(torch.atan2(level[..., 0], level[..., 2]))
    horizontal = level[..., ::2].norm(dim=-1)
    distance = torch.where(yaw > 25, 0.5, 2.0) / horizontal.clamp(min=1e-3)
    distance = torch.where(level[..., 1].abs() > 0.4, 0.1, distance)  # far above and below: nearer still
    inverse, at = distance.reciprocal()[None], torch.tensor([pitch])
    assert camera.distance_ahead(inverse, at, torch.zeros(1), fov).item() == pytest.approx(2.0, rel=0.05)
    assert camera.distance_ahead(inverse, at, torch.full((1,), 40.0), fov).item() == pytest.approx(
        0.5, rel=0.05
    )
    assert camera.distance_ahead(inverse, at, torch.full((1,), 90.0), fov).item() == math.inf, (
        "not in the picture"
    )
    assert camera.distance_ahead(inverse, torch.full((1,), 80.0), torch.zeros(1), fov).item() == math.inf
