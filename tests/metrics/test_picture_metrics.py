"""Picture metrics on pictures whose values are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics import (
    PSNR_CEILING,
    delta_psnr,
    edge_f1,
    edge_flicker,
    edges,
    gradient_map,
    grey,
    grid_energy,
    mean_change,
    psnr,
    spatial_gradient,
    ssim,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bars(*columns: int, width: int = 64) -> Tensor:
    """White bars of 8 pixels from each column on, on black: [3, 32, W]."""
    picture = torch.zeros(3, 32, width)
    for column in columns:
        picture[..., column : column + 8] = 1
    return picture


def test_psnr_of_known_errors():
    black = torch.zeros(3, 3, 4, 4)
    other = torch.stack([torch.full((3, 4, 4), level) for level in (1.0, 0.1, 0.01)])
    assert psnr(black, other).tolist() == pytest.approx([0.0, 20.0, 40.0], abs=1e-4)


def test_psnr_is_per_picture_symmetric_and_bounded():
    a, b = torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert psnr(a, b).shape == (5,)
    assert torch.equal(psnr(a, b), psnr(b, a))
    assert psnr(a, a).tolist() == pytest.approx([PSNR_CEILING] * 5)
    assert torch.equal(psnr(a[None], b[None])[0], psnr(a, b)), "any leading dimensions"


def test_psnr_falls_as_the_picture_gets_noisier():
    noise = torch.Generator().manual_seed(0)
    a = torch.full((1, 3, 16, 16), 0.5)
    values = [psnr(a, a + torch.randn(a.shape, generator=noise) * s).item() for s in (0.01, 0.03, 0.1, 0.3)]
    assert values == sorted(values, reverse=True)


def test_psnr_of_half_precision_pictures_is_computed_in_float32():
    a = torch.full((1, 3, 4, 4), 0.5)
    b = a + 2**-9
    assert psnr(a.half(), b.half()).item() == pytest.approx(psnr(a, b).item())


def test_delta_psnr_is_the_difference():
    assert delta_psnr(torch.tensor([20.0, 15.0]), torch.tensor([15.0, 15.0])).tolist() == [5.0, 0.0]


def test_grey_is_bt601_luma():
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 2, 5)
    assert grey(colours).shape == (3, 2, 5)
    assert grey(colours)[:, 0, 0].tolist() == pytest.approx([0.299, 0.587, 0.114])
    assert grey(torch.ones(1, 3, 2, 2)).mean().item() == pytest.approx(1)


def test_ssim_of_equal_pictures_is_one_and_of_the_negative_below_zero():
    a = torch.rand(2, 4, 3, 24, 32, generator=seeded())
    torch.testing.assert_close(ssim(a, a), torch.ones(2, 4))
    assert (ssim(a, 1 - a) < -0.5).all()


def test_ssim_of_flat_pictures_compares_their_brightness():
    dark, light = (torch.full((1, 3, 16, 16), level) for level in (0.25, 0.5))
    expected = (2 * 0.25 * 0.5 + 1e-4) / (0.25**2 + 0.5**2 + 1e-4)
    assert ssim(dark, light).item() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_one_window_is_the_formula():
    x, y = torch.rand(2, 11, 11, generator=seeded(1), dtype=torch.float64).numpy()
    at = np.arange(-5, 6)
    weights = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    weights /= weights.sum()
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
    cov = (weights * (x - mx) * (y - my)).sum()
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    a, b = (torch.from_numpy(p).float().expand(3, 11, 11) for p in (x, y))
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_unrelated_noise_is_0_and_ssim_falls_with_noise():
    a, b = torch.rand(2, 1, 3, 64, 64, generator=seeded())
    assert abs(ssim(a, b).item()) < 0.05
    values = [ssim(a, a + s * (b - 0.5)).item() for s in (0.1, 0.3, 1.0)]
    assert values == sorted(values, reverse=True)


def test_ssim_compares_one_picture_with_many_and_refuses_tiny_ones():
    a = torch.rand(5, 3, 16, 16, generator=seeded())
    assert ssim(a[0], a).shape == ssim(a, a[0]).shape == (5,)
    torch.testing.assert_close(ssim(a[0], a), ssim(a, a[0]))
    with pytest.raises(ValueError, match="10x16"):
        ssim(a[..., :10, :], a[..., :10, :])


def test_edges_are_at_the_steps_of_brightness():
    found = edges(torch.stack([bars(24), torch.full((3, 32, 64), 0.5)])[None])
    assert found.shape == (1, 2, 32, 64) and found.dtype == torch.bool
    columns = found[0, 0].any(0).nonzero().flatten().tolist()
    assert columns and all(min(abs(c - 24), abs(c - 32)) <= 1 for c in columns)
    assert found[0, 0].sum() == 2 * 32 and not found[0, 1].any()


def test_edge_f1_tolerates_one_pixel():
    truth = bars(24)
    assert edge_f1(truth, truth) == 1
    assert edge_f1(bars(25), truth) == 1
    assert edge_f1(bars(26), truth) == 0
    assert edge_f1(bars(4, 24), truth).item() == pytest.approx(2 / 3), "half of the edges are wrong"
    assert edge_f1(truth, bars(4, 24)).item() == pytest.approx(2 / 3), "half of the edges are missing"


def test_edge_f1_of_pictures_without_edges():
    flat = torch.full((3, 32, 64), 0.5)
    pictures = torch.stack([flat, bars(24), flat])
    assert edge_f1(pictures, torch.stack([flat, flat, bars(24)])).tolist() == [1.0, 0.0, 0.0]
    assert edge_f1(pictures[None], pictures[None]).shape == (1, 3)


def test_edge_flicker_is_the_share_of_edges_that_appear_or_disappear():
    on, off = bars(24), torch.zeros(3, 32, 64)
    frames = torch.stack([torch.stack(f) for f in ([on, on, on], [on, off, on], [on, on, off])])
    assert edge_flicker(frames).tolist() == [0.0, 1.0, 0.5]


def test_mean_change():
    black, white = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
    frames = torch.stack(
        [torch.stack(f) for f in ([black] * 3, [black, white, black], [white] + [black] * 2)]
    )
    assert mean_change(frames).tolist() == [0.0, 1.0, 0.5]
    assert mean_change(torch.arange(5).mul(0.1).view(5, 1, 1, 1).expand(5, 3, 2, 2)).item() == pytest.approx(
        0.1
    )


def test_the_gradient_of_a_bar_by_hand():
    """Two edges of 32 pixels, in rows only: 2 * 32 differences of 1, halved, in 32 x 64 pixels."""
    picture = bars(16)
    assert spatial_gradient(picture).item() == pytest.approx(2 * 32 / 2 / (32 * 64))
    assert gradient_map(picture)[:, 15].tolist() == pytest.approx([0.5] * 32)
    assert gradient_map(picture).sum(0).nonzero().flatten().tolist() == [15, 23]
    assert spatial_gradient(torch.nn.functional.avg_pool2d(picture, 8)[None].expand(2, -1, -1, -1)).shape == (
        2,
    )


def test_grid_energy_finds_a_pattern_of_dots():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(16, 3, 72, 128, generator=generator)
    assert grid_energy(noise).mean().item() == pytest.approx(1, abs=0.15)
    dots = 0.5 + 0.1 * noise
    dots[..., 1::4, 2::4] += 0.03
    assert grid_energy(dots).min() > 5
    darker = grid_energy(dots * 0.3 + 0.2)
    torch.testing.assert_close(darker, grid_energy(dots), rtol=1e-3, atol=1e-3)
    others = 0.5 + 0.1 * noise
    others[..., ::9, ::9] += 0.03
    assert grid_energy(others).mean() < 2, "a pattern of another period"
    assert grid_energy(dots[0]).shape == ()
