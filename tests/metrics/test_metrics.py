"""Each metric against cases whose answer is known without it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.token_files import SAMPLES
from geometry import camera
from metrics import (
    PSNR_CEILING,
    bits_per_token,
    bootstrap_interval,
    bootstrap_statistic,
    code_usage,
    codes_ratio,
    collapse_frame,
    confusion,
    delta_psnr,
    edge_f1,
    edge_flicker,
    edges,
    flip_rate,
    flow_magnitude,
    flow_profile,
    flow_ratio,
    flow_sign,
    frechet_distance,
    grey,
    horizontal_flow,
    jensen_shannon,
    macro_f1,
    mean_change,
    measure_turns,
    optical_flow,
    psnr,
    radial_flow,
    ssim,
    token_accuracy,
    unique_codes,
    vertical_flow,
)
from runtime.video import read_frames


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texture(height: int, width: int, grain: int = 6, pictures: int = 1) -> Tensor:
    """Smooth random pictures [N, 3, H, W], blobs of about `grain` pixels."""
    small = torch.rand(pictures, 3, height // grain, width // grain, generator=seeded())
    return F.interpolate(small, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


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


def test_psnr_is_of_each_picture_symmetric_and_bounded():
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


def test_delta_psnr_is_what_the_actions_are_worth():
    assert delta_psnr(torch.tensor([20.0, 15.0]), torch.tensor([15.0, 15.0])).tolist() == [5.0, 0.0]


def test_grey_weighs_the_colours_as_the_eye_does():
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 2, 5)
    assert grey(colours).shape == (3, 2, 5)
    assert grey(colours)[:, 0, 0].tolist() == pytest.approx([0.299, 0.587, 0.114])
    assert grey(torch.ones(1, 3, 2, 2)).mean().item() == pytest.approx(1)


# ---------------------------------------------------------------- pictures


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


def test_ssim_of_unrelated_noise_is_chance_and_falls_with_noise():
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


def test_edges_are_where_the_picture_jumps():
    found = edges(torch.stack([bars(24), torch.full((3, 32, 64), 0.5)])[None])
    assert found.shape == (1, 2, 32, 64) and found.dtype == torch.bool
    columns = found[0, 0].any(0).nonzero().flatten().tolist()
    assert columns and all(min(abs(c - 24), abs(c - 32)) <= 1 for c in columns)
    assert found[0, 0].sum() == 2 * 32 and not found[0, 1].any()


def test_edge_f1_forgives_one_pixel_and_no_more():
    truth = bars(24)
    assert edge_f1(truth, truth) == 1
    assert edge_f1(bars(25), truth) == 1
    assert edge_f1(bars(26), truth) == 0
    assert edge_f1(bars(4, 24), truth).item() == pytest.approx(2 / 3), "half of the edges are not there"
    assert edge_f1(truth, bars(4, 24)).item() == pytest.approx(2 / 3), "half of the edges are missing"


def test_edge_f1_of_pictures_without_edges():
    flat = torch.full((3, 32, 64), 0.5)
    pictures = torch.stack([flat, bars(24), flat])
    assert edge_f1(pictures, torch.stack([flat, flat, bars(24)])).tolist() == [1.0, 0.0, 0.0]
    assert edge_f1(pictures[None], pictures[None]).shape == (1, 3)


def test_edge_flicker_is_the_share_of_edges_that_come_and_go():
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


# ---------------------------------------------------------------- tokens


def test_token_accuracy():
    truth = torch.arange(12).view(1, 3, 4)
    wrong = truth.clone()
    wrong[0, 0] = 99
    assert token_accuracy(torch.cat([truth, wrong, truth + 1]), truth.expand(3, 3, 4)).tolist() == [
        1.0,
        pytest.approx(2 / 3),
        0.0,
    ]


def test_shuffled_tokens_score_chance():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 8, (2, 1, 200, 200), generator=generator).unbind(0)
    assert token_accuracy(a, b).item() == pytest.approx(1 / 8, abs=0.01)


def test_flip_rate():
    grid = torch.arange(12).view(1, 3, 4)
    changed = grid.clone()
    changed[0, 0, :3] = 99
    assert flip_rate(grid.expand(3, 3, 4), torch.cat([grid, changed, grid + 20])).tolist() == [
        0.0,
        pytest.approx(0.25),
        1.0,
    ]


def test_unique_codes_and_their_ratio():
    grids = torch.tensor([[[5, 5], [5, 5]], [[1, 2], [2, 1]], [[4, 3], [2, 1]]])
    assert unique_codes(grids).tolist() == [1, 2, 4]
    assert unique_codes(grids[None]).tolist() == [[1, 2, 4]]
    assert codes_ratio(grids, grids.flip(0)).tolist() == [0.25, 1.0, 4.0]


def test_bits_per_token_of_a_uniform_guess():
    truth = torch.randint(0, 1024, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    nats = torch.nn.functional.cross_entropy(torch.zeros(2, 1024, 6, 6), truth, reduction="sum").item()
    assert bits_per_token(nats, truth.numel()) == pytest.approx(10.0, rel=1e-5)
    assert bits_per_token(0.0, 7) == 0.0
    assert bits_per_token(3 * math.log(2), 3) == pytest.approx(1.0)


def test_code_usage():
    assert code_usage(torch.tensor([7, 0, 0, 0])) == (1, pytest.approx(1.0))
    assert code_usage(torch.tensor([3, 3, 3, 0])) == (3, pytest.approx(3.0))
    used, perplexity = code_usage(torch.tensor([90, 5, 5, 0]))
    assert used == 3 and 1 < perplexity < 2, "rarely used codes count little"


# ---------------------------------------------------------------- optical flow


@pytest.mark.parametrize("right, down", [(3, 0), (-3, 0), (0, 2), (0, -2), (2, -1)])
def test_the_flow_of_a_shifted_picture_is_the_shift(right, down):
    """A pixel of a 128x72 picture is 160/128 by 88/72 of the flow's."""
    before = texture(72, 128)
    flow = optical_flow(before, before.roll((down, right), (-2, -1)))
    x, y = right * 160 / 128, down * 88 / 72
    assert horizontal_flow(flow).item() == pytest.approx(x, abs=0.15)
    assert vertical_flow(flow).item() == pytest.approx(y, abs=0.15)
    assert flow_magnitude(flow).item() == pytest.approx(math.hypot(x, y), rel=0.1)


def test_the_flow_of_a_picture_to_itself_is_none():
    before = texture(72, 128)
    flow = optical_flow(before, before)
    assert flow_magnitude(flow) < 0.01
    assert (
        flow_sign(horizontal_flow(flow))
        == flow_sign(vertical_flow(flow))
        == flow_sign(radial_flow(flow))
        == 0
    )
    assert flow_sign(torch.tensor([-2.0, 0.001, 3.0])).tolist() == [-1, 0, 1]


def test_flow_is_of_each_pair_and_of_the_middle_rows_and_columns():
    pictures = texture(72, 128, pictures=6).unflatten(0, (2, 3))
    flow = optical_flow(pictures, pictures.roll(2, -1))
    assert flow.shape == (2, 3, 2, 72 - 7, 147 - 13)  # 8-82 % of 88 rows, 8-92 % of 160 columns
    torch.testing.assert_close(flow[1, 2], optical_flow(pictures[1, 2], pictures[1, 2].roll(2, -1)))
    for measure in (flow_magnitude, horizontal_flow, vertical_flow, radial_flow):
        assert measure(flow).shape == (2, 3)


def test_radial_flow_is_the_part_away_from_the_centre_of_the_whole_picture():
    y, x = torch.meshgrid(torch.arange(7, 72) + 0.5 - 44, torch.arange(13, 147) + 0.5 - 80, indexing="ij")
    r = torch.hypot(x, y)
    away, across = torch.stack([x, y]) / r, torch.stack([-y, x]) / r
    assert radial_flow(torch.stack([away, -2 * away, across])).tolist() == pytest.approx([1, -2, 0], abs=1e-5)
    near = away * (r < 0.15 * 160)
    assert radial_flow(near) == 0, "what is near the centre hardly moves on a walk"


@pytest.mark.parametrize("zoom", [1.06, 1 / 1.06])
def test_radial_flow_of_a_zoom(zoom):
    """A place at r goes to zoom * r."""
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
    made = torch.stack([truth, 5 * truth, torch.tensor([2.0, 0.0, 0.0]), torch.zeros(3)])
    assert flow_profile(made, truth.expand(4, 3)).tolist() == pytest.approx([1, 1, 1 / 3, 0])
    apart = flow_profile(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert apart == 0
    assert flow_profile(torch.ones(3), torch.zeros(3)).isnan()


def test_flow_ratio():
    truth = torch.tensor([[1.0, 2.0, 3.0]])
    assert flow_ratio(torch.cat([truth, truth / 2, 0 * truth]), truth.expand(3, 3)).tolist() == [
        1.0,
        0.5,
        0.0,
    ]
    assert flow_ratio(truth, 0 * truth).isnan().all()


def test_a_frozen_picture_follows_nothing():
    """The flow of a picture to itself is not quite 0, and steady: its cosine would be near 1."""
    frozen = texture(72, 128).expand(5, 3, 72, 128)
    moving = torch.stack([frozen[0].roll(2 * k, -1) for k in range(5)])
    made, truth = (flow_magnitude(optical_flow(p[:-1], p[1:])) for p in (frozen, moving))
    assert flow_profile(made, truth) == 0 and flow_ratio(made, truth) < 0.01
    assert flow_profile(truth, made).isnan() and flow_ratio(truth, made).isnan()


# ---------------------------------------------------------------- camera rotation

FOV, WIDE = 70.0, 100.0  # degrees, vertical


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    """Recorded pictures [N, 1, 144, 256] in grey, for spheres to stand in."""
    frames = [
        frame
        for video in sorted((SAMPLES / "video").glob("*.mp4"))
        for frame in read_frames(video, wanted=range(30, 480, 150))
    ]
    return grey(torch.from_numpy(np.stack(frames)).float().permute(0, 3, 1, 2) / 255)[:, None]


def seen(scenes: Tensor, scene_pose: Tensor, yaw: float, pitch: float) -> Tensor:
    """What a camera turned to `yaw` and `pitch` sees of scenes taken for far away and WIDE degrees high."""
    pose = torch.tensor([0.0, 0.0, 0.0, yaw, pitch])[None]
    sharp = 2  # rendered larger, then averaged, as a camera does
    directions = camera.rays(72 * sharp, 128 * sharp, FOV)
    world = torch.einsum("ij,hwj->hwi", camera.rotation(pose[0, 3], pose[0, 4]), directions)
    away = torch.einsum("ij,hwi->hwj", camera.rotation(scene_pose[0], scene_pose[1]), world)
    grid, inside = camera.project(away[None], 144, 256, WIDE)
    assert inside.float().mean() > 0.99, "a test without borders"
    return F.avg_pool2d(camera.warp(scenes, grid.expand(len(scenes), -1, -1, -1)), sharp)


def turned(scenes: Tensor, yaw: float, by: float, pitch: float) -> tuple[Tensor, Tensor]:
    """The scenes before and after a turn to the right by `yaw` and down by `by` from `pitch`."""
    middle = torch.tensor([yaw / 2, pitch + by / 2])
    return seen(scenes, middle, 0.0, pitch), seen(scenes, middle, yaw, pitch + by)


@pytest.mark.parametrize("pitch", [-30.0, 0.0, 40.0])
@pytest.mark.parametrize("yaw, by", [(1, 0), (-15, 0), (0, 2), (0, 15), (0, -15), (10, 10), (15, -15)])
def test_measured_turns_of_recorded_pictures_are_the_turns(scenes, pitch, yaw, by):
    before, after = turned(scenes, yaw, by, pitch)
    found = measure_turns(before, after, np.full(len(scenes), pitch), FOV)
    assert found.shape == (len(scenes), 3)
    error = np.abs(found[:, :2] - [yaw, by])
    assert np.median(error, 0).max() < 0.05 and np.quantile(error, 0.9, 0).max() < 0.4
    assert np.median(found[:, 2]) > 0.9


def test_a_still_camera_does_not_turn_and_other_scenes_are_told_apart(scenes):
    still = measure_turns(*turned(scenes, 0, 0, 10.0), np.full(len(scenes), 10.0), FOV)
    np.testing.assert_allclose(still[:, :2], 0, atol=0.05)
    assert (still[:, 2] > 0.99).all()
    before, after = turned(scenes, 5, 0, 10.0)
    other = measure_turns(before, after.roll(3, 0), np.full(len(scenes), 10.0), FOV)
    assert np.median(other[:, 2]) < 0.6, "the correlation says that these do not belong together"


def test_turns_are_of_each_pair_and_an_unknown_pitch_counts_as_level(scenes):
    before, after = turned(scenes[:1], 4, 0, 0.0)
    pitch = np.full(130, np.nan)  # more pairs than are measured at once
    pitch[1] = 0.0
    found = measure_turns(before.expand(130, -1, -1, -1), after.expand(130, -1, -1, -1), pitch, FOV)
    assert found.shape == (130, 3)
    np.testing.assert_allclose(found, found[:1].repeat(130, 0), atol=1e-6)
    assert measure_turns(before[:0], after[:0], pitch[:0], FOV).shape == (0, 3)


# ---------------------------------------------------------------- classes


def test_confusion_counts_truth_in_rows():
    counts = confusion(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), classes=4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_macro_f1_counts_classes_alike():
    assert macro_f1(np.diag([90, 5, 5])) == 1
    # Class 0: 90 right, 10 taken too many: F1 180/190. Class 1 is never found: 0.
    assert macro_f1(np.array([[90, 0], [10, 0]])) == pytest.approx(180 / 190 / 2)
    # Precision 1/2 and recall 1; precision 1 and recall 1/2; class 2 occurs nowhere.
    assert macro_f1(np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]])) == pytest.approx(2 / 3)
    assert math.isnan(macro_f1(np.zeros((3, 3), int)))


def test_guessing_scores_chance():
    rng = np.random.default_rng(0)
    assert macro_f1(confusion(*rng.integers(0, 5, (2, 20_000)), 5)) == pytest.approx(1 / 5, abs=0.01)


# ---------------------------------------------------------------- distributions


def spread(covariance: list[list[float]], mean: list[float], n: int = 50) -> Tensor:
    """[N, D] with exactly this mean and covariance."""
    x = torch.randn(n, len(mean), generator=seeded(), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.atleast_2d(x.T.cov()))).T
    return x @ torch.linalg.cholesky(torch.tensor(covariance).double()).T + torch.tensor(mean).double()


def test_frechet_distance_of_known_gaussians():
    unit = [[1.0, 0.0], [0.0, 1.0]]
    a = spread(unit, [0, 0])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, spread(unit, [3, 4], n=80)) == pytest.approx(25)
    # Of independent axes: the squares of the differences of the deviations.
    assert frechet_distance(a, spread([[9.0, 0.0], [0.0, 4.0]], [0, 0])) == pytest.approx(
        (3 - 1) ** 2 + (2 - 1) ** 2
    )
    line = spread([[4.0]], [1.0])
    assert frechet_distance(line, spread([[0.25]], [3.0])) == pytest.approx(2**2 + 1.5**2)


def test_frechet_distance_of_correlated_gaussians_is_the_formula():
    """The trace of a 2x2 root: tr(M^1/2)^2 = tr M + 2 sqrt(det M)."""
    one, two = [[2.0, 0.9], [0.9, 1.0]], [[1.0, -0.5], [-0.5, 3.0]]
    product = np.array(one) @ np.array(two)
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = 1 + np.trace(one) + np.trace(two) - 2 * root
    a, b = spread(one, [0, 0]), spread(two, [0, 1])
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_frechet_distance_of_flat_sets_and_of_no_sets():
    """Fewer rows than columns leave directions without spread."""
    a = torch.randn(5, 20, generator=seeded())
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, a + 1) == pytest.approx(20, rel=1e-4)
    assert math.isnan(frechet_distance(a[:1], a))
    assert math.isnan(frechet_distance(a * math.nan, a)), "a broken picture is not a perfect one"


def test_jensen_shannon():
    counts = torch.tensor([3, 1, 0, 0])
    assert jensen_shannon(counts, 7 * counts) == pytest.approx(0, abs=1e-9)
    assert jensen_shannon(counts, counts.flip(0)) == pytest.approx(1)
    # Entropy of (3/4, 1/4) less the mean of the entropies of (1, 0) and (1/2, 1/2).
    expected = 0.75 * math.log2(4 / 3) + 0.25 * 2 - 0.5
    assert jensen_shannon(torch.tensor([5, 0]), torch.tensor([1, 1])) == pytest.approx(expected)
    assert jensen_shannon(torch.tensor([1, 1]), torch.tensor([5, 0])) == pytest.approx(expected)
    assert math.isnan(jensen_shannon(torch.zeros(4), counts))


@pytest.mark.parametrize(
    "codes, divergence, change",
    [(0.4, 0.1, 1.0), (2.1, 0.1, 1.0), (1.0, 0.6, 1.0), (1.0, 0.1, 0.05)],
    ids=["few codes", "noise", "other codes", "frozen"],
)
def test_collapse_frame_names_the_first_bad_window(codes, divergence, change):
    good = 0.6, 0.4, 0.2  # poor, but no collapse
    series = np.array([good, good, (codes, divergence, change), good]).T
    assert collapse_frame(*series, window=32) == 64
    assert collapse_frame(*series[:, ::-1], window=32) == 32
    assert collapse_frame(*series[:, :2], window=32) == -1


# ---------------------------------------------------------------- intervals


def test_bootstrap_interval_of_clips_that_agree_is_narrow():
    weights = np.array([10.0, 20.0, 30.0])
    assert bootstrap_interval(0.7 * weights, weights, seed=0) == pytest.approx((0.7, 0.7))


def test_bootstrap_interval_is_as_wide_as_theory_says_and_repeats():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = bootstrap_interval(values, np.ones(400), seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert (low, high) == bootstrap_interval(values, np.ones(400), seed=1)
    assert (low, high) != bootstrap_interval(values, np.ones(400), seed=2)


def test_one_clip_has_no_interval():
    assert all(math.isnan(bound) for bound in bootstrap_interval(np.ones(1), np.ones(1), seed=0))
    assert all(math.isnan(bound) for bound in bootstrap_statistic([np.ones(9)], np.mean, seed=0))


def test_bootstrap_statistic_of_a_mean_is_bootstrap_interval():
    values = np.random.default_rng(0).normal(5.0, 2.0, (30, 4))
    interval = bootstrap_interval(values.sum(1), np.full(30, 4.0), seed=3, draws=400)
    assert bootstrap_statistic(list(values), np.mean, seed=3, draws=400) == pytest.approx(interval)


def test_bootstrap_statistic_draws_whole_clips_of_any_length_and_shape():
    """A thousand equal frames of a clip say no more than one."""
    rng = np.random.default_rng(0)
    levels = rng.normal(0, 1, 40)
    short, long = ([np.full((n, 2), level) for level in levels] for n in (1, 50))
    median = bootstrap_statistic(short, np.median, seed=0)
    assert bootstrap_statistic(long, np.median, seed=0) == pytest.approx(median)
    assert median[0] < np.median(levels) < median[1] and median[1] - median[0] > 0.3
    mixed = [np.ones(int(n)) for n in rng.integers(1, 9, 10)]
    assert bootstrap_statistic(mixed, np.mean, seed=0) == (1.0, 1.0)
