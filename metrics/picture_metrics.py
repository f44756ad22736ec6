"""Metrics of pictures: PSNR, SSIM, edges and change over time.

Pictures are float [..., 3, H, W] in [0, 1]. Each function returns one value per picture or sequence, so that
the caller can average over windows, horizons or clips.
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The rounding noise of 8-bit pictures, (1/255)^2 / 12: pictures that differ less look equal on a screen.
MSE_FLOOR = 1 / (12 * 255**2)
PSNR_CEILING = -10 * math.log10(MSE_FLOOR)  # 58.9 dB
SSIM_WINDOW = 11  # pixels
CANNY = (100, 200)  # thresholds on the gradient of 8-bit luma: OpenCV's own example


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB: -10 log10(mean squared error).

    a, b [..., 3, H, W] in [0, 1] -> [...]. From 0 (black against white) to PSNR_CEILING; higher is better.
    Differences below 8-bit rounding count as equal: else one frame without change would dominate a mean.
    """
    mse = (a.float() - b.float()).square().mean((-3, -2, -1))
    return -10 * mse.clamp_min(MSE_FLOOR).log10()


def grey(pictures: Tensor) -> Tensor:
    """Luma of pictures [..., 3, H, W] -> [..., H, W]: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=pictures.device)
    return (pictures.float() * weights[:, None, None]).sum(-3)


def to_luma_bytes(pictures: Tensor) -> np.ndarray:
    """8-bit luma for OpenCV: [..., 3, H, W] in [0, 1] -> [N, H, W] uint8."""
    luma = grey(pictures).clamp(0, 1).mul(255).round().byte()
    return luma.reshape(-1, *luma.shape[-2:]).cpu().numpy()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of luma (Wang et al., IEEE Trans. Image Processing 13(4), 2004).

    a, b [..., 3, H, W] -> [...]: the mean over all positions of an 11x11 Gaussian window (sigma 1.5), with
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
    found = np.stack([cv2.Canny(picture, *CANNY) > 0 for picture in to_luma_bytes(pictures)])
    return torch.from_numpy(found).reshape(*pictures.shape[:-3], *pictures.shape[-2:])


def edge_f1(a: Tensor, b: Tensor) -> Tensor:
    """F1 of the edges of `a` against those of `b`; edges match within one pixel.

    a, b [..., 3, H, W] -> [...]. From 0 to 1; higher is better. Blur lowers the recall, noise the precision.
    1 where neither picture has edges. The boundary measure of Martin et al. (IEEE PAMI 26(5), 2004), with a
    tolerance of one pixel instead of an assignment.
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
    """Share of edges that appear or disappear between neighbouring frames: mean of 1 - edge_f1.

    frames [..., T, 3, H, W] -> [...]. From 0 (all edges stay within a pixel) to 1. Lower is better while the
    camera is at rest.
    """
    return (1 - edge_f1(frames[..., :-1, :, :, :], frames[..., 1:, :, :, :])).mean(-1)


def mean_change(frames: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames: [..., T, 3, H, W] -> [...] in 0..1.

    While the camera is at rest the recording's value is best; a higher one is flicker, 0 is a frozen picture.
    """
    return frames.float().diff(dim=-4).abs().mean((-4, -3, -2, -1))


def gradient_map(pictures: Tensor) -> Tensor:
    """Absolute difference of each pixel's luma from its right and its lower neighbour's, averaged over both.

    Pictures [..., 3, H, W] -> [..., H, W] in 0..1; where there is no neighbour its difference is 0.
    """
    luma = grey(pictures)
    right, lower = luma.diff(dim=-1).abs(), luma.diff(dim=-2).abs()
    return (F.pad(right, (0, 1)) + F.pad(lower, (0, 0, 0, 1))) / 2


def spatial_gradient(pictures: Tensor) -> Tensor:
    """Mean of `gradient_map`: [..., 3, H, W] -> [...] in 0..1.

    The truth's value is best: below it the picture is blurred, above it noisy.
    """
    return gradient_map(pictures).mean((-2, -1))


def grid_energy(pictures: Tensor, periods: tuple[int, ...] = (2, 4)) -> Tensor:
    """Energy of a pattern that repeats every so many pixels, over that of the frequencies around it.

    Pictures [..., 3, H, W], sides divisible by the periods -> [...]: from the luma under a Hann window, the
    mean power at the harmonics of the periods in both directions, over the mean power of their neighbours
    two bins away. 1 without a pattern; a decoder with strides (4 pixels to a token) may leave one, which
    looks like a grid of dots. Zero frequency along both axes is left out.
    """
    luma = grey(pictures)
    H, W = luma.shape[-2:]
    window = torch.hann_window(H, device=luma.device)[:, None] * torch.hann_window(W, device=luma.device)
    power = torch.fft.fft2((luma - luma.mean((-2, -1), keepdim=True)) * window).abs().square()
    rows, columns = (
        sorted({side * k // period for period in periods for k in range(period)}) for side in (H, W)
    )
    bins = [(y, x) for y in rows for x in columns if y or x]
    near = [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2) if dy or dx]
    at = torch.stack([power[..., y, x] for y, x in bins], -1).mean(-1)
    around = torch.stack([power[..., (y + dy) % H, (x + dx) % W] for y, x in bins for dy, dx in near], -1)
    return at / around.mean(-1).clamp_min(1e-12)


def delta_psnr(right: Tensor, wrong: Tensor) -> Tensor:
    """PSNR under the true actions minus PSNR under other actions, in dB: how much the actions matter.

    0 for a model that ignores them; higher is better. Controllability metric of Genie (Bruce et al., arXiv
    2402.15391, section 3), there at the 4th frame.
    """
    return right - wrong
