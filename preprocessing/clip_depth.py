"""Depth of a clip's kept frames for its token file: recorded by the game, or predicted from the pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.recordings import Clip, Plan, read_depth_file
from dataset.surroundings import encode_inverse_ray_distance
from dataset.token_files import DEPTH_NETWORK
from depth.predictor import load_depth
from runtime.video import resize, to_float


def at_nearest_positions(depth: np.ndarray, latent_size: Sequence[int]) -> np.ndarray:
    """Depth [K, h, w] -> [K, 2H, 2W], twice the `latent_size` (H, W), sampled at the nearest positions.

    A mean over an edge would lie between two surfaces.
    """
    sizes = zip(depth.shape[1:], latent_size, strict=True)
    rows, columns = (((np.arange(2 * new) + 0.5) * old / (2 * new)).astype(int) for old, new in sizes)
    return depth[:, rows[:, None], columns]


def recorded_surroundings(clip: Clip, plan: Plan, latent_size: Sequence[int]) -> dict[str, np.ndarray]:
    """The optional arrays of a token file from the clip's depth file, of the K kept frames.

    depth [K, 2H, 2W], and nodes and origin where the clip has them. Raises ClipError if the depth file is
    broken or of another length.
    """
    surroundings = read_depth_file(clip.video, plan.needed)
    extras = {"depth": at_nearest_positions(surroundings.log_inverse[plan.frames], latent_size)}
    if surroundings.nodes is not None:
        extras |= {"nodes": surroundings.nodes[plan.frames], "origin": surroundings.origin[plan.frames]}
    return extras


class PredictedDepth:
    """The depth network on its device, for token files of one size. Raises CheckpointError on creation."""

    def __init__(self, checkpoint: Path, device: torch.device, latent_size: Sequence[int]):
        self.predictor = load_depth(checkpoint, device)
        self.fingerprint = self.predictor.fingerprint
        self.latent_size = latent_size

    def picture(self, frame: np.ndarray) -> np.ndarray:
        """A recorded frame [H, W, 3] uint8 at the network's size, averaged over areas."""
        return resize(frame, self.predictor.config.height, self.predictor.config.width)

    def predict(self, pictures: list[np.ndarray], pitch: np.ndarray) -> Tensor:
        """B results of `picture` and pitches [B] in degrees, NaN where unknown -> inverse ray distances
        [B, h, w] in 1/m, on the device."""
        batch = torch.from_numpy(np.stack(pictures)).to(self.predictor.device)
        return self.predictor.predict(to_float(batch), torch.from_numpy(pitch))

    def extras(self, batches: list[Tensor]) -> dict[str, np.ndarray]:
        """The results of `predict` for all K kept frames -> the optional arrays of a token file.

        depth [K, 2H, 2W] uint8, in the code of recorded depth, and the network's fingerprint.
        """
        inverse = torch.cat(batches).cpu().numpy()
        depth = encode_inverse_ray_distance(at_nearest_positions(inverse, self.latent_size))
        return {"depth": depth, DEPTH_NETWORK: np.array(self.fingerprint)}
