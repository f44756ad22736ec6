"""Reprojection without labels, in a scene whose pictures and depth are computed exactly."""

import pytest
import torch
from torch import Tensor

from depth.reprojection import (
    Views,
    photometric_error,
    reprojection_error,
    shown_by_others,
    smoothness_error,
)
from geometry import camera

FOV = 70.0
SIZE, COARSE = (72, 128), (36, 64)
WALL_M, PILLAR_M, PILLAR_WIDTH_M = 6.0, 2.0, 0.8


def view(pose: list[float], size: tuple[int, int], pillar: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Picture [3, H, W], inverse ray distance [H, W] and pillar mask [H, W] of a wall, with a pillar before
    it, at a pose near the origin."""
    at = torch.tensor(pose)
    directions = camera.rays(*size, FOV) @ camera.rotation(at[3], at[4]).mT
    start = camera.position(at)

    def hit(z: float) -> tuple[Tensor, Tensor, Tensor]:
        distance = (z - start[2]) / directions[..., 2]
        x, y = (start[i] + distance * directions[..., i] for i in (0, 1))
        return x, y, distance

    def colour(x: Tensor, y: Tensor, shift: float) -> Tensor:
        waves = (torch.sin(2.5 * x + shift), torch.sin(2 * y + x + shift), torch.sin(1.5 * x - 2 * y + shift))
        return torch.stack(waves) * 0.4 + 0.5

    x, y, distance = hit(WALL_M)
    picture, inverse = colour(x, y, 0.0), 1 / distance
    x, y, distance = hit(PILLAR_M)
    mask = (x.abs() < PILLAR_WIDTH_M / 2) if pillar else torch.zeros(size, dtype=torch.bool)
    return (
        torch.where(mask, colour(3 * x, 3 * y, 2.0), picture),
        torch.where(mask, 1 / distance, inverse),
        mask,
    )


def scene(
    others: list[list[float]], pillar: bool = False, pose: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0)
) -> tuple[Views, Tensor]:
    """The views of a scene from some poses, and the true log inverse ray distance [1, H, W] from `pose`."""
    views = Views(
        view(list(pose), SIZE, pillar)[0][None],
        torch.tensor([pose]),
        torch.stack([view(other, SIZE, pillar)[0] for other in others])[None],
        torch.tensor([others]),
    )
    return views, view(list(pose), COARSE, pillar)[1].log()[None]


BESIDE = [[0.4, 0.0, -0.3, 4.0, 2.0], [-0.4, 0.1, 0.3, -3.0, 0.0]]


def test_the_error_is_lowest_at_the_true_depth():
    views, truth = scene(BESIDE)
    factors = (0.5, 0.7, 0.85, 0.95, 1.0, 1.05, 1.2, 1.4, 2.0)
    errors = [float(reprojection_error(truth - torch.tensor(f).log(), views, FOV)[0]) for f in factors]
    assert errors[4] == min(errors) < 0.01
    assert errors[:5] == sorted(errors[:5], reverse=True) and errors[4:] == sorted(errors[4:])


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_gradient_descent_finds_the_true_depth(factor):
    views, truth = scene(BESIDE)
    wrong = truth - torch.tensor(factor).log()
    scale = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([scale], lr=0.03)
    for _ in range(30):
        optimizer.zero_grad()
        reprojection_error(wrong + scale, views, FOV)[0].backward()
        optimizer.step()
    assert scale.item() == pytest.approx(torch.tensor(factor).log().item(), abs=0.03)


def test_each_pixel_moves_towards_the_true_depth():
    views, truth = scene(BESIDE)
    free = (truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))).clone()
    before = (free - truth).abs().mean().item()
    free.requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        reprojection_error(free, views, FOV)[0].backward()
        optimizer.step()
    assert (free - truth).abs().mean().item() < 0.6 * before


def hidden_by_pillar(pose_from: list[float], pose_to: list[float]) -> Tensor:
    """[H, W] bool: wall pixels of the view at `pose_from` before which the pillar is, seen from `pose_to`."""
    _, inverse, pillar = view(pose_from, SIZE, True)
    directions = camera.rays(*SIZE, FOV) @ camera.rotation(*torch.tensor(pose_from)[3:]).mT
    points = camera.position(torch.tensor(pose_from)) + directions / inverse[..., None]
    eye = camera.position(torch.tensor(pose_to))
    share = (PILLAR_M - eye[2]) / (points[..., 2] - eye[2])
    crossing = eye[0] + share * (points[..., 0] - eye[0])
    return ~pillar & (crossing.abs() < PILLAR_WIDTH_M / 2)


def test_hidden_and_outside_pixels_are_found():
    pose, other = [0.0] * 5, [0.5, 0.0, 0.0, 0.0, 0.0]
    inverse = view(pose, SIZE, True)[1][None]
    shown = shown_by_others(inverse, torch.tensor([pose]), torch.tensor([other]), FOV)[0]
    hidden = hidden_by_pillar(pose, other)
    _, inside = camera.reproject(torch.tensor([other]), torch.tensor([pose]), inverse, *SIZE, FOV)
    assert hidden.float().mean() > 0.02
    assert (shown[hidden & inside[0]]).float().mean() < 0.1
    assert (shown[~hidden & inside[0]]).float().mean() > 0.98
    assert not shown[~inside[0]].any()


def test_hidden_pixels_do_not_count():
    pose, other = [0.0] * 5, [0.5, 0.0, 0.0, 0.0, 0.0]
    views, truth = scene([other], pillar=True)
    picture = views.picture.clone().requires_grad_(True)
    changed = Views(picture, views.pose, views.others, views.other_poses)
    reprojection_error(truth, changed, FOV)[0].backward()
    reached = picture.grad.abs().amax((0, 1)) > 0
    # A window of SSIM reaches over the border of what is hidden.
    core = -torch.nn.functional.max_pool2d(-hidden_by_pillar(pose, other)[None, None].float(), 9, 1, 4) > 0
    assert core.sum() > 50 and not reached[core[0, 0]].any()
    assert reached.float().mean() > 0.5


def test_a_second_view_shows_what_the_first_hides():
    views, truth = scene([[0.5, 0.0, 0.0, 0.0, 0.0], [-0.5, 0.0, 0.0, 0.0, 0.0]], pillar=True)
    alone = Views(views.picture, views.pose, views.others[:, :1], views.other_poses[:, :1])
    missing = Views(
        views.picture,
        views.pose,
        views.others,
        views.other_poses.clone().index_fill_(1, torch.tensor(1), torch.nan),
    )
    error, share = reprojection_error(truth, views, FOV)
    error_alone, share_alone = reprojection_error(truth, alone, FOV)
    assert share > share_alone + 0.05 and error < error_alone + 0.01
    found = reprojection_error(truth, missing, FOV)
    torch.testing.assert_close(found[0], error_alone)
    torch.testing.assert_close(found[1], share_alone)


def test_a_still_camera_and_unknown_poses_give_nothing():
    for other in ([0.0] * 5, [float("nan")] * 5):
        views, truth = scene([other])
        if other[0] != other[0]:
            views = Views(views.picture, views.pose, views.picture[:, None], torch.tensor([[other]]))
        free = (truth + 0.3).requires_grad_(True)
        error, share = reprojection_error(free, views, FOV)
        assert error.item() == share.item() == 0.0
        error.backward()
        assert free.grad.abs().max() == 0


def test_a_mirrored_scene_has_the_same_error():
    views, truth = scene(BESIDE, pillar=True, pose=(0.1, 0.2, -0.1, 5.0, -3.0))
    mirrored = views.flip(torch.tensor([True]))
    for shift in (0.0, 0.2):
        a, b = (
            reprojection_error(depth + shift, v, FOV)
            for depth, v in ((truth, views), (truth.flip(2), mirrored))
        )
        torch.testing.assert_close(a[0], b[0], atol=2e-4, rtol=0.01)
        torch.testing.assert_close(a[1], b[1], atol=0.01, rtol=0)
    same = views.flip(torch.tensor([False]))
    torch.testing.assert_close(same.others, views.others)
    torch.testing.assert_close(same.other_poses, views.other_poses)


def test_photometric_error_by_hand():
    a = torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    assert photometric_error(a, a).abs().max() < 1e-5
    assert 0.3 < photometric_error(a, 1 - a).mean() <= 1
    flat = torch.full((1, 3, 4, 4), 0.5)
    assert photometric_error(flat, flat + 0.2).mean() == pytest.approx(
        0.85 * (1 - (2 * 0.35 + 1e-4) / (0.25 + 0.49 + 1e-4)) / 2 + 0.15 * 0.2, rel=1e-3
    )


def test_depth_edges_are_cheap_at_picture_edges():
    depth = torch.zeros(1, 8, 8)
    depth[:, :, 4:] = 1.0
    edge, other = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    edge[..., 8:], other[..., 8:, :] = 1.0, 1.0
    assert smoothness_error(depth, edge) < 0.01 * smoothness_error(depth, other)
    assert smoothness_error(torch.zeros(1, 8, 8), other) == 0
