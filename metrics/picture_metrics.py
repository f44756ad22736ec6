"""What is measured: pure functions, tensors in, numbers out, each with its meaning, range and direction.

Functions that compare pictures or grids give one value for each of them, so that the caller can average over
windows, horizons or clips; the rest give floats. Pictures are float [..., 3, H, W] in [0, 1].
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The rounding noise of 8-bit pictures, (1/255)^2 / 12: closer ones cannot be told apart on a screen.
MSE_FLOOR = 1 / (12 * 255**2)
PSNR_CEILING = -10 * math.log10(MSE_FLOOR)  # 58.9 dB
SSIM_WINDOW = 11  # pixels
CANNY = (100, 200)  # thresholds on the gradient of 8-bit luma: OpenCV's own example


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


# ---------------------------------------------------------------- optical flow: how the picture moves
# The protocol published with ForgeWM (arXiv 2608.14022): every 4th frame, 160x88, Farneback's flow (SCIA
# 2003), without the borders.


# ---------------------------------------------------------------- camera rotation from two pictures


# ---------------------------------------------------------------- keys read back


# ---------------------------------------------------------------- distributions, over long rollouts


# ---------------------------------------------------------------- intervals
