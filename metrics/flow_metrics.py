"""Optical flow between pictures, and measures of motion derived from it.

The protocol published with ForgeWM (arXiv 2608.14022): every 4th frame, pictures of 160x88, Farneback's flow
(SCIA 2003), borders left out.
"""

import math

import cv2
import numpy as np
import torch
from torch import Tensor

from metrics.picture_metrics import to_luma_bytes

FLOW_EVERY = 4  # frames between two pictures
FLOW_SIZE = 160, 88  # width and height
FLOW_ROWS, FLOW_COLUMNS = (0.08, 0.82), (0.08, 0.92)  # shares of the picture: no borders and no player's hand
RADIAL_BEYOND = 0.15  # share of the width: radial flow is measured farther from the centre than this
OCCLUDED = 1.0  # pixels: a pixel whose flow there and back ends farther away is occluded
FLOW_NOISE = 0.01  # pixels: a smaller flow is numerical noise


def _measured_rows_and_columns() -> tuple[slice, slice]:
    """FLOW_ROWS and FLOW_COLUMNS of the 160x88 picture."""
    width, height = FLOW_SIZE
    top, bottom = (round(share * height) for share in FLOW_ROWS)
    left, right = (round(share * width) for share in FLOW_COLUMNS)
    return slice(top, bottom), slice(left, right)


def _prepared(pictures: Tensor) -> list[np.ndarray]:
    """Pictures [..., 3, H, W] -> luma of 160x88 pixels, uint8."""
    return [cv2.resize(p, FLOW_SIZE, interpolation=cv2.INTER_AREA) for p in to_luma_bytes(pictures)]


def _farneback(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Flow from luma `a` to `b`, uint8 [H, W] -> [H, W, 2] pixels."""
    return cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 4, 21, 4, 7, 1.5, 0)


def optical_flow(before: Tensor, after: Tensor) -> Tensor:
    """Displacement of each pixel of `before`: pictures [..., 3, H, W] -> [..., 2, h, w] (x right, y down).

    In pixels of the 160x88 picture, cropped to FLOW_ROWS and FLOW_COLUMNS.
    """
    rows, columns = _measured_rows_and_columns()
    flow = [_farneback(a, b)[rows, columns] for a, b in zip(_prepared(before), _prepared(after), strict=True)]
    flow = torch.from_numpy(np.stack(flow)).movedim(-1, 1)
    return flow.reshape(*before.shape[:-3], *flow.shape[1:])


def warp_error(before: Tensor, after: Tensor) -> Tensor:
    """Mean absolute difference of luma between `after` and `before` warped onto it by optical flow.

    before, after [..., 3, H, W] in [0, 1] -> [...] in 0..1, over the pixels whose flow there and back
    returns within OCCLUDED pixels; NaN where there is none. The temporal warping error of Lai et al. (ECCV
    2018, arXiv 1808.00449), with Farneback's flow: what changes without moving. Compare it with the
    recording's; a blurred picture has less.
    """
    width, height = FLOW_SIZE
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
    rows, columns = _measured_rows_and_columns()
    errors = []
    for a, b in zip(_prepared(before), _prepared(after), strict=True):
        back, forth = _farneback(b, a), _farneback(a, b)
        source = grid + back  # where each pixel of b was in a
        there = cv2.remap(forth, source, None, cv2.INTER_LINEAR)
        seen = np.linalg.norm(back + there, axis=-1) < OCCLUDED
        seen &= ((source >= 0) & (source <= [width - 1, height - 1])).all(-1)
        warped = cv2.remap(a, source, None, cv2.INTER_LINEAR)
        seen, error = seen[rows, columns], cv2.absdiff(warped, b)[rows, columns]
        errors.append(error[seen].mean() / 255 if seen.any() else math.nan)
    return torch.tensor(errors, dtype=torch.float32).reshape(before.shape[:-3])


def flow_magnitude(flow: Tensor) -> Tensor:
    """Mean length of the flow [..., 2, h, w] -> [...] pixels, at least 0."""
    return flow.square().sum(-3).sqrt().mean((-2, -1))


def horizontal_flow(flow: Tensor) -> Tensor:
    """Median flow to the right, [..., 2, h, w] -> [...] pixels. Negative for a turn or step to the right."""
    return flow[..., 0, :, :].flatten(-2).median(-1).values


def vertical_flow(flow: Tensor) -> Tensor:
    """Median flow downwards, [..., 2, h, w] -> [...] pixels. Negative when the camera pitches down."""
    return flow[..., 1, :, :].flatten(-2).median(-1).values


def radial_flow(flow: Tensor) -> Tensor:
    """Mean flow away from the picture's centre, over pixels farther from it than RADIAL_BEYOND of the width.

    [..., 2, h, w] -> [...] pixels. Positive for a step forward, negative for a step back.
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


def flow_profile(generated: Tensor, truth: Tensor) -> Tensor:
    """Cosine of two series of flow lengths [..., T] -> [...] in 0..1: whether both move at the same times.

    Higher is better. 0 where `generated` moves less than FLOW_NOISE on average: the flow of a frozen picture
    is not exactly 0, and its cosine would be high. NaN where `truth` does not move. Two steady series score
    near 1 at any speed and in any direction.
    """
    cosine = (generated * truth).sum(-1) / (generated.norm(dim=-1) * truth.norm(dim=-1)).clamp_min(1e-12)
    cosine = torch.where(generated.mean(-1) > FLOW_NOISE, cosine, torch.zeros_like(cosine))
    return torch.where(truth.mean(-1) > FLOW_NOISE, cosine, torch.full_like(cosine, math.nan))


def flow_sign(flow: Tensor | np.ndarray) -> np.ndarray:
    """Sign of flow in pixels: -1 or 1, and 0 below FLOW_NOISE."""
    flow = np.asarray(flow)
    return np.sign(flow) * (np.abs(flow) > FLOW_NOISE)
