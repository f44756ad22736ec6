"""Optical flow between pictures, and what it says of motion."""

import math

import cv2
import numpy as np
import torch
from torch import Tensor

from metrics.picture_metrics import _bytes

FLOW_EVERY, FLOW_SIZE = 4, (160, 88)  # frames; width and height
FLOW_ROWS, FLOW_COLUMNS = (0.08, 0.82), (0.08, 0.92)  # of the picture: no borders, and no hand in the corner
RADIAL_BEYOND = 0.15
FLOW_NOISE = 0.01  # pixels: less is the arithmetic of the flow, not movement


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
