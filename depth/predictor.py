"""The depth network in use: frozen, loaded from a checkpoint."""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from depth.depth_net import DepthConfig, DepthNet
from runtime.checkpoint import SHIPPED, build, fingerprint, load
from runtime.device import amp_dtype, autocast

SHIPPED_DEPTH = SHIPPED / "depth.pt"
DEPTH_KIND = "depth"
BATCH = 64  # pictures that go through the network together


class DepthPredictor:
    """A frozen DepthNet. It is not a Module: what holds one does not count its weights as its own."""

    def __init__(self, network: DepthNet, path: str | Path = ""):
        self.network = network.requires_grad_(False).eval()
        self.path = Path(path)

    @property
    def config(self) -> DepthConfig:
        """Sizes, field of view and the sky's ray distance."""
        return self.network.config

    @property
    def device(self) -> torch.device:
        return self.network.stem.weight.device

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify config and weights. Token files with predicted depth carry them."""
        return fingerprint(asdict(self.config), self.network.state_dict())

    def to(self, device: torch.device | str) -> "DepthPredictor":
        """Moves the weights."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def predict(self, pictures: Tensor, pitch: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, Hp, Wp] in [0, 1] -> inverse ray distances [B, H, W] float32 in 1/m.

        `pitch` [B] is the camera's in degrees, NaN where it is unknown; None: unknown for all. The result
        is on the network's device, and the sky at the config's `farthest_m`. Raises ValueError for pictures
        of another size.
        """
        return self.predict_with_error(pictures, pitch)[0]

    @torch.no_grad()
    def predict_at(self, pictures: Tensor, pitch: Tensor, size: tuple[int, int]) -> Tensor:
        """As `predict`, for pictures of any size, sampled at `size` (rows, columns)."""
        wanted = (self.config.height, self.config.width)
        if tuple(pictures.shape[-2:]) != wanted:
            pictures = F.interpolate(pictures.float(), wanted, mode="bilinear", antialias=True)
        found = self.predict(pictures.float().clamp(0, 1), pitch)
        if tuple(found.shape[-2:]) == tuple(size):
            return found
        return F.interpolate(found[:, None], size, mode="nearest")[:, 0]

    @torch.no_grad()
    def predict_with_error(self, pictures: Tensor, pitch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `predict`, and the expected absolute error of the logarithm [B, H, W]: 0.1 is 10 %."""
        inverse, errors = [], []
        if pitch is None:
            pitch = torch.full((len(pictures),), torch.nan)
        for part, angle in zip(pictures.split(BATCH), pitch.float().split(BATCH), strict=True):
            with autocast(self.device, amp_dtype(self.device)):
                log_inverse, log_error = self.network(part.to(self.device), angle.to(self.device))
            inverse.append(log_inverse.exp().clamp(min=1 / self.config.farthest_m))
            errors.append(log_error.exp())
        return torch.cat(inverse), torch.cat(errors)


def load_depth(path: str | Path = SHIPPED_DEPTH, device: torch.device | str = "cpu") -> DepthPredictor:
    """The depth network in `path`, on `device`. Raises CheckpointError if the file is missing or broken."""
    return DepthPredictor(build(DepthNet, DepthConfig, load(path, DEPTH_KIND), path), path).to(device)
