"""Optical flow of shifted and zoomed pictures."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics import (
    flow_magnitude,
    flow_profile,
    flow_sign,
    horizontal_flow,
    optical_flow,
    radial_flow,
    vertical_flow,
    warp_error,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texture(height: int, width: int, grain: int = 6, pictures: int = 1) -> Tensor:
    """Smooth random pictures [N, 3, H, W], blobs of about `grain` pixels."""
    small = torch.rand(pictures, 3, height // grain, width // grain, generator=seeded())
    return F.interpolate(small, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


@pytest.mark.parametrize("right, down", [(3, 0), (-3, 0), (0, 2), (0, -2), (2, -1)])
def test_the_flow_of_a_shifted_picture_is_the_shift(right, down):
    """A pixel of a 128x72 picture is 160/128 by 88/72 pixels of the flow."""
    before = texture(72, 128)
    flow = optical_flow(before, before.roll((down, right), (-2, -1)))
    x, y = right * 160 / 128, down * 88 / 72
    assert horizontal_flow(flow).item() == pytest.approx(x, abs=0.15)
    assert vertical_flow(flow).item() == pytest.approx(y, abs=0.15)
    assert flow_magnitude(flow).item() == pytest.approx(math.hypot(x, y), rel=0.1)


def test_the_flow_of_a_picture_to_itself_is_0():
    before = texture(72, 128)
    flow = optical_flow(before, before)
    assert flow_magnitude(flow) < 0.01
    for measure in (horizontal_flow, vertical_flow, radial_flow):
        assert flow_sign(measure(flow)) == 0
    assert flow_sign(torch.tensor([-2.0, 0.001, 3.0])).tolist() == [-1, 0, 1]


def test_flow_is_computed_per_pair_in_the_middle_of_the_picture():
    pictures = texture(72, 128, pictures=6).unflatten(0, (2, 3))
    flow = optical_flow(pictures, pictures.roll(2, -1))
    assert flow.shape == (2, 3, 2, 72 - 7, 147 - 13)  # 8-82 % of 88 rows, 8-92 % of 160 columns
    torch.testing.assert_close(flow[1, 2], optical_flow(pictures[1, 2], pictures[1, 2].roll(2, -1)))
    for measure in (flow_magnitude, horizontal_flow, vertical_flow, radial_flow):
        assert measure(flow).shape == (2, 3)


def test_radial_flow_points_away_from_the_centre_of_the_whole_picture():
    y, x = torch.meshgrid(torch.arange(7, 72) + 0.5 - 44, torch.arange(13, 147) + 0.5 - 80, indexing="ij")
    r = torch.hypot(x, y)
    away, across = torch.stack([x, y]) / r, torch.stack([-y, x]) / r
    assert radial_flow(torch.stack([away, -2 * away, across])).tolist() == pytest.approx([1, -2, 0], abs=1e-5)
    near = away * (r < 0.15 * 160)
    assert radial_flow(near) == 0, "pixels near the centre are left out"


@pytest.mark.parametrize("zoom", [1.06, 1 / 1.06])
def test_radial_flow_of_a_zoom(zoom):
    """A pixel at radius r moves to zoom * r."""
    before = texture(88, 160)
    grid = F.affine_grid(torch.eye(2, 3)[None] / zoom, (1, 3, 88, 160), align_corners=False)
    after = F.grid_sample(before, grid, padding_mode="border", align_corners=False)
    y, x = torch.meshgrid(torch.arange(7, 72) + 0.5 - 44, torch.arange(13, 147) + 0.5 - 80, indexing="ij")
    r = torch.hypot(x, y)
    expected = (zoom - 1) * r[r > 24].mean().item()
    flow = optical_flow(before, after)
    assert radial_flow(flow).item() == pytest.approx(expected, rel=0.15)
    assert abs(horizontal_flow(flow).item()) < 0.15 * abs(expected)


def test_flow_profile_is_a_cosine():
    truth = torch.tensor([1.0, 2.0, 2.0])
    generated = torch.stack([truth, 5 * truth, torch.tensor([2.0, 0.0, 0.0]), torch.zeros(3)])
    assert flow_profile(generated, truth.expand(4, 3)).tolist() == pytest.approx([1, 1, 1 / 3, 0])
    apart = flow_profile(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert apart == 0
    assert flow_profile(torch.ones(3), torch.zeros(3)).isnan()


def test_a_frozen_picture_has_no_flow_profile():
    """The flow of a picture to itself is not exactly 0, and steady: its cosine would be near 1."""
    frozen = texture(72, 128).expand(5, 3, 72, 128)
    moving = torch.stack([frozen[0].roll(2 * k, -1) for k in range(5)])
    still, truth = (flow_magnitude(optical_flow(p[:-1], p[1:])) for p in (frozen, moving))
    assert flow_profile(still, truth) == 0 and still.sum() < 0.01 * truth.sum()
    assert flow_profile(truth, still).isnan()


def test_warp_error_is_what_no_motion_explains():
    before = texture(72, 128)
    moved = before.roll((1, 3), (-2, -1))
    noise = 0.1 * torch.randn(before.shape, generator=seeded(1))
    assert warp_error(before, before).item() == pytest.approx(0, abs=1e-3)
    assert warp_error(before, moved).item() < 0.01
    assert (moved - before).abs().mean() > 0.05, "though it changes"
    assert warp_error(before, moved + noise).item() > 0.03
    assert warp_error(before[None], moved[None]).shape == (1, 1)
