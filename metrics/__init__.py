"""Metrics of pictures, tokens, optical flow and camera rotation, and statistics over clips.

Every function states its definition, range, better direction and source. `perceptual` is imported on its own,
because its networks take a second to load.
"""

from metrics.camera_turns import measure_turns, peak
from metrics.flow_metrics import (
    FLOW_EVERY,
    FLOW_NOISE,
    flow_magnitude,
    flow_profile,
    flow_sign,
    horizontal_flow,
    optical_flow,
    radial_flow,
    vertical_flow,
    warp_error,
)
from metrics.picture_metrics import (
    PSNR_CEILING,
    delta_psnr,
    edge_f1,
    edge_flicker,
    edges,
    grey,
    mean_change,
    psnr,
    spatial_gradient,
    ssim,
)
from metrics.statistics import (
    bootstrap_interval,
    bootstrap_statistic,
    collapse_frame,
    confusion,
    frechet_distance,
    jensen_shannon,
    macro_f1,
)
from metrics.token_metrics import (
    bits_per_token,
    code_usage,
    codes_ratio,
    flip_rate,
    token_accuracy,
    unique_codes,
)

__all__ = [
    "FLOW_EVERY",
    "FLOW_NOISE",
    "PSNR_CEILING",
    "bits_per_token",
    "bootstrap_interval",
    "bootstrap_statistic",
    "code_usage",
    "codes_ratio",
    "collapse_frame",
    "confusion",
    "delta_psnr",
    "edge_f1",
    "edge_flicker",
    "edges",
    "flip_rate",
    "flow_magnitude",
    "flow_profile",
    "flow_sign",
    "frechet_distance",
    "grey",
    "horizontal_flow",
    "jensen_shannon",
    "macro_f1",
    "mean_change",
    "measure_turns",
    "optical_flow",
    "peak",
    "psnr",
    "radial_flow",
    "spatial_gradient",
    "ssim",
    "token_accuracy",
    "unique_codes",
    "vertical_flow",
    "warp_error",
]
