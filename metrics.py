"""What is measured: pure functions, tensors in, numbers out, each with its meaning, range and direction.

Functions that compare pictures or grids give one value for each of them, so that the caller can average over
windows, horizons or clips; the rest give floats. Pictures are float [..., 3, H, W] in [0, 1].
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import camera

# The rounding noise of 8-bit pictures, (1/255)^2 / 12: closer ones cannot be told apart on a screen.
MSE_FLOOR = 1 / (12 * 255**2)
PSNR_CEILING = -10 * math.log10(MSE_FLOOR)  # 58.9 dB
SSIM_WINDOW = 11  # pixels
CANNY = (100, 200)  # thresholds on the gradient of 8-bit luma: OpenCV's own example
FLOW_EVERY, FLOW_SIZE = 4, (160, 88)  # frames; width and height
FLOW_ROWS, FLOW_COLUMNS = (0.08, 0.82), (0.08, 0.92)  # of the picture: no borders, and no hand in the corner
RADIAL_BEYOND = 0.15
FLOW_NOISE = 0.01  # pixels: less is the arithmetic of the flow, not movement
REACH = 18.0  # degrees: the largest turn that is looked for
CELL = 0.75  # degrees between two samples of an unrolled picture
TURN_ROUNDS, TURN_STAYS = 4, 0.1  # times at most; degrees of pitch: less from one to the next ends it
TURNS_AT_ONCE = 64  # an unrolled pair takes about a megabyte
COLLAPSE_CODES, COLLAPSE_DIVERGENCE, COLLAPSE_CHANGE = (0.5, 2.0), 0.5, 0.1


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB: -10 log10(mean squared error).

    a, b [..., 3, H, W] in [0, 1] -> [...]. From 0 (black against white) to PSNR_CEILING (equal, or nearer to
    each other than 8-bit rounding; without it one still frame would outweigh all others); higher is better.
    """
    mse = (a.float() - b.float()).square().mean((-3, -2, -1))
    return -10 * mse.clamp_min(MSE_FLOOR).log10()


def grey(pictures: Tensor) -> Tensor:
    """Luma of pictures [..., 3, H, W] -> [..., H, W]: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=pictures.device)
    return (pictures.float() * weights[:, None, None]).sum(-3)


def _bytes(pictures: Tensor) -> np.ndarray:
    """8-bit luma for OpenCV: [..., 3, H, W] -> [N, H, W] uint8."""
    luma = grey(pictures).clamp(0, 1).mul(255).round().byte()
    return luma.reshape(-1, *luma.shape[-2:]).cpu().numpy()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of luma (Wang et al., IEEE Trans. Image Processing 13(4), 2004).

    a, b [..., 3, H, W] -> [...]: the mean over places where an 11x11 Gaussian window (sigma 1.5) fits, with
    K1 = 0.01, K2 = 0.03. From -1 to 1 (equal pictures); higher is better. Raises ValueError for pictures
    smaller than the window.
    """
    a, b = torch.broadcast_tensors(a, b)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"pictures of {a.shape[-2]}x{a.shape[-1]}: SSIM needs {SSIM_WINDOW} pixels a side")
    x, y = (grey(p).reshape(-1, 1, *p.shape[-2:]) for p in (a, b))
    at = torch.arange(SSIM_WINDOW, device=x.device) - SSIM_WINDOW // 2
    bell = torch.exp(-(at**2) / (2 * 1.5**2))
    bell = bell / bell.sum()

    def blur(p: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(p, bell[None, None, :, None]), bell[None, None, None, :])

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return value.mean((1, 2, 3)).reshape(a.shape[:-3])


def edges(pictures: Tensor) -> Tensor:
    """Edges of pictures [..., 3, H, W] by Canny (IEEE PAMI 8(6), 1986) on 8-bit luma -> bool [..., H, W]."""
    found = np.stack([cv2.Canny(picture, *CANNY) > 0 for picture in _bytes(pictures)])
    return torch.from_numpy(found).reshape(*pictures.shape[:-3], *pictures.shape[-2:])


def edge_f1(a: Tensor, b: Tensor) -> Tensor:
    """How well the edges of a are those of b: F1 of precision and recall, an edge within a pixel is a match.

    a, b [..., 3, H, W] -> [...]. From 0 to 1; higher is better: a blur loses edges (recall), noise adds some
    (precision). 1 where neither has an edge. The boundary measure of Martin et al. (IEEE PAMI 26(5), 2004)
    with a tolerance of one pixel in place of an assignment.
    """
    ea, eb = edges(a).float(), edges(b).float()
    near_a, near_b = (
        F.max_pool2d(e.reshape(-1, 1, *e.shape[-2:]), 3, 1, 1).reshape(e.shape) for e in (ea, eb)
    )
    total = ea.sum((-2, -1)), eb.sum((-2, -1))
    precision = (ea * near_b).sum((-2, -1)) / total[0].clamp_min(1)
    recall = (eb * near_a).sum((-2, -1)) / total[1].clamp_min(1)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-9)
    return torch.where((total[0] == 0) & (total[1] == 0), torch.ones_like(f1), f1)


def edge_flicker(frames: Tensor) -> Tensor:
    """Share of edges that come and go between neighbouring frames: mean of 1 - edge_f1.

    frames [..., T, 3, H, W] -> [...]. From 0 (edges stay within a pixel) to 1; for a still camera lower is
    better.
    """
    return (1 - edge_f1(frames[..., :-1, :, :, :], frames[..., 1:, :, :, :])).mean(-1)


def mean_change(frames: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames: [..., T, 3, H, W] -> [...] in 0..1.

    For a still camera like the truth's is good; above it the picture shimmers, 0 is frozen.
    """
    return frames.float().diff(dim=-4).abs().mean((-4, -3, -2, -1))


def delta_psnr(right: Tensor, wrong: Tensor) -> Tensor:
    """PSNR under the true actions less PSNR under random ones, in dB: how much the actions matter.

    0 where they are ignored; higher is better. Controllability metric of Genie (Bruce et al., arXiv
    2402.15391, section 3), there at the 4th frame.
    """
    return right - wrong


# ---------------------------------------------------------------- tokens


def token_accuracy(predicted: Tensor, truth: Tensor) -> Tensor:
    """Share of cells whose code is the true one. Tokens [..., H, W] -> [...] in 0..1; higher is better.

    Strict: a code flips when the picture shifts by a fraction of a cell, so a picture that looks right can
    score low. Read it beside the copy baseline.
    """
    return (predicted == truth).float().mean((-2, -1))


def flip_rate(a: Tensor, b: Tensor) -> Tensor:
    """Share of cells whose code differs between two grids [..., H, W] -> [...] in 0..1.

    Between two pictures of the same view lower is better: those codes changed for nothing.
    """
    return 1 - token_accuracy(a, b)


def unique_codes(tokens: Tensor) -> Tensor:
    """Number of different codes in each grid. Tokens [..., H, W] -> [...] int64 in 1..H*W.

    No direction of its own: like the truth's is good, far fewer means a picture collapsed to a blur.
    """
    ordered = tokens.flatten(-2).sort(-1).values
    return 1 + (ordered[..., 1:] != ordered[..., :-1]).sum(-1)


def codes_ratio(predicted: Tensor, truth: Tensor) -> Tensor:
    """Different codes in each predicted grid over those in the true one. Tokens [..., H, W] -> [...] > 0.

    1 is best; below it the prediction is poorer than the truth, above it noisier.
    """
    return unique_codes(predicted) / unique_codes(truth)


def bits_per_token(nats: float, tokens: int) -> float:
    """Cross entropy summed over `tokens` cells, in nats -> bits a cell.

    From 0 (every code foretold with certainty), log2(V) for a guess among V codes; lower is better.
    """
    return nats / tokens / math.log(2)


def code_usage(counts: Tensor) -> tuple[int, float]:
    """How often each code was used, counts [V] -> (number of codes used, perplexity).

    Perplexity is exp(entropy of the code frequencies), from 1 (one code does it all) to V (all used alike):
    how many codes the tokenizer really has. Higher is better. van den Oord et al., arXiv 1711.00937.
    """
    p = counts.float() / counts.sum().clamp_min(1)
    return int((counts > 0).sum()), float(torch.exp(torch.special.entr(p).sum()))


# ---------------------------------------------------------------- optical flow: how the picture moves
# The protocol published with ForgeWM (arXiv 2608.14022): every 4th frame, 160x88, Farneback's flow (SCIA
# 2003), without the borders.


def optical_flow(before: Tensor, after: Tensor) -> Tensor:
    """Where each place of `before` went: pictures [..., 3, H, W] -> [..., 2, h, w] (x right, y down).

    In pixels of the 160x88 picture, for its middle (FLOW_ROWS, FLOW_COLUMNS) only.
    """
    width, height = FLOW_SIZE
    top, bottom = (round(share * height) for share in FLOW_ROWS)
    left, right = (round(share * width) for share in FLOW_COLUMNS)

    def prepared(pictures: Tensor) -> np.ndarray:
        return np.stack([cv2.resize(p, FLOW_SIZE, interpolation=cv2.INTER_AREA) for p in _bytes(pictures)])

    flow = [
        cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 4, 21, 4, 7, 1.5, 0)[top:bottom, left:right]
        for a, b in zip(prepared(before), prepared(after), strict=True)
    ]
    flow = torch.from_numpy(np.stack(flow)).movedim(-1, 1)
    return flow.reshape(*before.shape[:-3], *flow.shape[1:])


def flow_magnitude(flow: Tensor) -> Tensor:
    """Mean length of the flow [..., 2, h, w] -> [...] in pixels >= 0. No direction of its own."""
    return flow.square().sum(-3).sqrt().mean((-2, -1))


def horizontal_flow(flow: Tensor) -> Tensor:
    """Median of the flow to the right, [..., 2, h, w] -> [...] pixels: below 0 for a turn or a step right."""
    return flow[..., 0, :, :].flatten(-2).median(-1).values


def vertical_flow(flow: Tensor) -> Tensor:
    """Median of the flow downwards, [..., 2, h, w] -> [...] pixels: below 0 for a look down."""
    return flow[..., 1, :, :].flatten(-2).median(-1).values


def radial_flow(flow: Tensor) -> Tensor:
    """Mean flow away from the picture's centre, over places farther from it than RADIAL_BEYOND of its width.

    [..., 2, h, w] -> [...] pixels: above 0 for a walk forward, below 0 for one back.
    """
    width, height = FLOW_SIZE
    rows = torch.arange(flow.shape[-2], device=flow.device) + round(FLOW_ROWS[0] * height) + 0.5 - height / 2
    columns = (
        torch.arange(flow.shape[-1], device=flow.device) + round(FLOW_COLUMNS[0] * width) + 0.5 - width / 2
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    r = torch.hypot(x, y)
    away = (flow[..., 0, :, :] * x + flow[..., 1, :, :] * y) / r.clamp_min(1e-6)
    return away[..., r > RADIAL_BEYOND * width].mean(-1)


def flow_profile(made: Tensor, truth: Tensor) -> Tensor:
    """Cosine of two series of flow lengths [..., T] -> [...] in 0..1: does it move when the truth moves?

    Higher is better; 0 where it moves less than FLOW_NOISE on average (the flow of one picture to itself is
    not quite 0, and its cosine is high), NaN where the truth does not move. Two steady series score near 1
    whatever they show: it forgives a wrong speed (`flow_ratio` does not) and says nothing about directions.
    """
    cosine = (made * truth).sum(-1) / (made.norm(dim=-1) * truth.norm(dim=-1)).clamp_min(1e-12)
    cosine = torch.where(made.mean(-1) > FLOW_NOISE, cosine, torch.zeros_like(cosine))
    return torch.where(truth.mean(-1) > FLOW_NOISE, cosine, torch.full_like(cosine, math.nan))


def flow_sign(flow: Tensor | np.ndarray) -> np.ndarray:
    """-1, 0 or 1 for flow in pixels; less than FLOW_NOISE is no movement and so neither sign."""
    flow = np.asarray(flow)
    return np.sign(flow) * (np.abs(flow) > FLOW_NOISE)


def flow_ratio(made: Tensor, truth: Tensor) -> Tensor:
    """Flow of a series over the truth's, [..., T] -> [...] >= 0; 1 is best, NaN if the truth is at rest."""
    total = truth.sum(-1)
    return torch.where(truth.mean(-1) > FLOW_NOISE, made.sum(-1) / total, torch.full_like(total, math.nan))


# ---------------------------------------------------------------- camera rotation from two pictures


def measure_turns(
    before: Tensor, after: Tensor, pitch: np.ndarray, vertical_fov_degrees: float
) -> np.ndarray:
    """The camera's turns from the grey pictures `before` to those `after`, [N, 1, H, W] each, alone.

    Both pictures of a pair are unrolled onto a sphere (longitude and latitude), where a turn about the
    vertical is a plain shift. The shift with the best normalised cross-correlation of the middle, refined by
    a parabola, is the turn. A change of pitch is a shift too once the second picture is unrolled at its own
    pitch, so that is done again at the pitch found last until it stays; the first try takes `pitch` [N], the
    absolute pitch of `before` in degrees (NaN counts as level).

    Returns [N, 3]: yaw (+right) and pitch (+down) in degrees, up to REACH, and the correlation (-1..1), which
    says how sure that is. Median errors for turns of up to 15 degrees of 128x72 pictures, without walking:
    0.01 degrees for recorded pictures, 0.05 after a tokenizer; 90th percentiles 0.05 and 0.25.
    """
    before, after = before.cpu(), after.cpu()
    tilt = torch.from_numpy(np.nan_to_num(pitch)).float()
    turns = np.zeros((len(before), 3))
    for first in range(0, len(before), TURNS_AT_ONCE):
        now = slice(first, first + TURNS_AT_ONCE)
        turns[now] = _turns(before[now], after[now], tilt[now], vertical_fov_degrees)
    return turns


def _turns(before: Tensor, after: Tensor, tilt: Tensor, fov: float) -> np.ndarray:
    """`measure_turns` of as many pairs as fit into memory when unrolled."""
    height, width = before.shape[-2:]
    half_x = float(np.degrees(np.arctan(width / 2 / camera.focal_length(height, fov))))
    half = np.array([fov / 2, half_x])
    middle = (np.maximum(half - REACH, half / 3) / CELL).astype(int)  # half the size of what is looked for
    before, after = _even_contrast(before), _even_contrast(after)
    unrolled = camera.warp(before, _unroll(tilt, half, height, width, fov))[:, 0].numpy()
    turns, moving = np.zeros((len(tilt), 3)), np.arange(len(tilt))
    for _ in range(TURN_ROUNDS):
        last = turns[moving, 1]
        grid = _unroll(tilt[moving] + torch.from_numpy(last).float(), half, height, width, fov)
        found = camera.warp(after[moving], grid)[:, 0].numpy()
        turns[moving] = [_shift(unrolled[k], f, middle) for k, f in zip(moving, found, strict=True)]
        moving = moving[np.abs(turns[moving, 1] - last) > TURN_STAYS]
        if not len(moving):
            break
    return turns


def _shift(before: np.ndarray, after: np.ndarray, middle: np.ndarray) -> tuple[float, float, float]:
    """Where the middle of `after` lies in `before`: degrees to the right and down, and the correlation."""
    centre = np.array(before.shape) // 2
    (top, left), (bottom, right) = centre - middle, centre + middle + 1
    score = cv2.matchTemplate(before, after[top:bottom, left:right], cv2.TM_CCOEFF_NORMED)
    y, x = np.unravel_index(score.argmax(), score.shape)
    return (
        (x + peak(score[y], x) - left) * CELL,
        (y + peak(score[:, x], y) - top) * CELL,
        float(score[y, x]),
    )


def _unroll(tilt: Tensor, half: np.ndarray, height: int, width: int, fov: float) -> Tensor:
    """Grids [B, h, w, 2] that read pictures at equal steps of latitude and longitude about `tilt` [B]."""
    latitude, longitude = (torch.arange(-int(h / CELL), int(h / CELL) + 1) * CELL for h in half)
    latitude = torch.deg2rad(latitude[:, None] + tilt[:, None, None])  # [B, h, 1]
    longitude = torch.deg2rad(longitude)
    world = [latitude.cos() * longitude.sin(), latitude.sin(), latitude.cos() * longitude.cos()]
    world = torch.stack(torch.broadcast_tensors(*world), -1)  # [B, h, w, 3]
    to_world = camera.rotation(torch.zeros_like(tilt), tilt)
    return camera.project(torch.einsum("bij,bhwi->bhwj", to_world, world), height, width, fov)[0]


def _even_contrast(pictures: Tensor, size: int = 9) -> Tensor:
    """Pictures [B, 1, H, W] less their local mean, over their local spread: every texture counts alike."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, size, 1, size // 2, count_include_pad=False)

    centred = pictures - mean(pictures)
    return centred / (mean(centred**2).sqrt() + 0.02)  # 0.02 of 0..1: below it is noise


def peak(values: np.ndarray, i: int) -> float:
    """How far from the largest value i the top of the parabola through it and its neighbours lies."""
    if not 0 < i < len(values) - 1:
        return 0.0
    bend = values[i - 1] - 2 * values[i] + values[i + 1]
    return float(0.5 * (values[i - 1] - values[i + 1]) / bend) if bend else 0.0


# ---------------------------------------------------------------- keys read back


def confusion(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """How often each class [N] was taken for each: counts [C, C], rows truth, columns predicted."""
    pairs = np.asarray(truth).astype(int) * classes + np.asarray(predicted).astype(int)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def macro_f1(confusion: np.ndarray) -> float:
    """Mean over classes of F1, the harmonic mean of precision and recall (van Rijsbergen 1979).

    confusion [C, C] -> 0..1, higher is better; every class counts alike, however rare. Classes that occur
    neither in truth nor in predictions are left out; NaN if that leaves none.
    """
    right, total = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    there = total > 0
    return float((2 * right[there] / total[there]).mean()) if there.any() else math.nan


# ---------------------------------------------------------------- distributions, over long dreams


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features [N, D] and [M, D], each taken for a Gaussian:
    |mean difference|^2 + tr(A + B - 2 (A B)^1/2) (FID, Heusel et al., arXiv 1706.08500).

    From 0 (the same mean and covariance), lower is better. Few pictures make it larger: compare only sets of
    the same size. NaN where a set has fewer than two rows (no covariance), or features that are not numbers.
    """
    if min(len(a), len(b)) < 2 or not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    (mean_a, cov_a), (mean_b, cov_b) = (
        (features.mean(0), torch.atleast_2d(features.T.cov())) for features in (a.double(), b.double())
    )
    root = _square_root(cov_a)
    # A B has the eigenvalues of the symmetric A^1/2 B A^1/2.
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * mixed
    return float(distance.clamp_min(0))


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def jensen_shannon(counts_a: Tensor, counts_b: Tensor) -> float:
    """Jensen-Shannon divergence of two histograms [V], in bits (Lin, IEEE Trans. Inf. Theory 37(1), 1991).

    From 0 (the same shares) to 1 (nothing in common); lower is better. NaN where a histogram is empty.
    """
    p, q = (counts.double() / counts.sum() for counts in (counts_a, counts_b))
    middle = torch.special.entr((p + q) / 2).sum()
    apart = (torch.special.entr(p).sum() + torch.special.entr(q).sum()) / 2
    return float((middle - apart).clamp_min(0)) / math.log(2)


def collapse_frame(
    codes_ratio: np.ndarray, divergence: np.ndarray, change_ratio: np.ndarray, window: int
) -> int:
    """The first frame of the first window in which a long dream has collapsed; -1 if it never does.

    One value for each window of `window` frames: different codes in a frame over the truth's, Jensen-Shannon
    divergence of the codes used from the truth's in bits, change between frames over the truth's. The rule: a
    dream has collapsed when it uses fewer than half or more than twice as many different codes as the truth
    (COLLAPSE_CODES), other codes (COLLAPSE_DIVERGENCE), or hardly changes any more (COLLAPSE_CHANGE).
    """
    low, high = COLLAPSE_CODES
    codes_ratio, change_ratio = np.asarray(codes_ratio), np.asarray(change_ratio)
    collapsed = (codes_ratio < low) | (codes_ratio > high)
    collapsed |= (np.asarray(divergence) > COLLAPSE_DIVERGENCE) | (change_ratio < COLLAPSE_CHANGE)
    return int(collapsed.argmax()) * window if collapsed.any() else -1


# ---------------------------------------------------------------- intervals


def bootstrap_interval(
    sums: np.ndarray, weights: np.ndarray, seed: int, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a weighted mean over clips (Efron & Tibshirani 1993, chapter 13).

    `sums` [N] is each clip's sum of values and `weights` [N] how many values it gave: the mean is
    sums.sum() / weights.sum(). Whole clips are drawn again, because the frames of one are alike.
    -> (low, high). One clip says nothing about the spread between clips: (nan, nan).
    """
    if len(sums) < 2:
        return math.nan, math.nan
    chosen = _draws(len(sums), draws, seed)
    return _percentiles(np.asarray(sums)[chosen].sum(1) / np.asarray(weights)[chosen].sum(1), level)


def bootstrap_statistic(
    groups: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], float],
    seed: int,
    level: float = 0.95,
    draws: int = 500,
) -> tuple[float, float]:
    """`bootstrap_interval` for any statistic: `groups` are each clip's values, joined when drawn."""
    if len(groups) < 2:
        return math.nan, math.nan
    chosen = _draws(len(groups), draws, seed)
    return _percentiles([statistic(np.concatenate([groups[i] for i in row])) for row in chosen], level)


def _draws(clips: int, draws: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, clips, (draws, clips))


def _percentiles(values: Sequence[float] | np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
