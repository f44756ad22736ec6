"""Depth as colours, and sheets of pictures beside their depths."""

import cv2
import numpy as np
import torch
from torch import Tensor

from runtime.video import enlarge, grid, label, to_uint8

NEAREST_M, FARTHEST_M = 0.5, 100.0  # ray distances of the brightest and the darkest colour
GAP = 4  # pixels between the pictures of a sheet


def depth_colours(inverse: Tensor) -> np.ndarray:
    """Inverse ray distances [H, W] in 1/m -> [H, W, 3] uint8, near bright and far dark, logarithmic."""
    logarithm = (inverse.float().cpu().numpy().clip(1 / FARTHEST_M, 1 / NEAREST_M) * FARTHEST_M).clip(1)
    shade = np.log(logarithm) / np.log(FARTHEST_M / NEAREST_M) * 255
    coloured = cv2.applyColorMap(shade.round().astype(np.uint8), cv2.COLORMAP_INFERNO)
    return cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB)


def depth_sheet(
    pictures: Tensor,
    predicted: Tensor,
    recorded: Tensor | None = None,
    captions: list[str] | None = None,
    scale: int = 2,
) -> np.ndarray:
    """One row for each frame: picture | predicted | recorded depth, [Hs, Ws, 3] uint8.

    Pictures [N, 3, Hp, Wp] in [0, 1], inverse ray distances [N, H, W] in 1/m, `recorded` NaN or None where it
    is unknown; `captions` stand above the predicted depths.
    """
    factor = pictures.shape[-1] // predicted.shape[-1] * scale
    captions = captions or ["predicted depth"] * len(pictures)
    cells = []
    for i, picture in enumerate(to_uint8(pictures).numpy()):
        row = [label(enlarge(picture, scale), "picture")]
        row.append(label(enlarge(depth_colours(predicted[i]), factor), captions[i]))
        if recorded is not None:
            known = bool(torch.isfinite(recorded[i]).all())
            true = enlarge(depth_colours(recorded[i].nan_to_num(0.0)), factor)
            row.append(label(true, "recorded depth" if known else "not recorded"))
        cells += [np.pad(cell, ((0, GAP), (0, GAP), (0, 0))) for cell in row]
    return grid(cells, 3 if recorded is not None else 2)
