"""The networks that compare pictures: perceptual distances, an embedding and inverse dynamics."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evaluation.inverse_dynamics import InverseDynamics
from metrics.perceptual import EffNetDistance, LPIPSDistance, lpips_available


@dataclass
class PictureNetworks:
    """The networks that compare pictures. All of them are frozen."""

    perceptual: dict[str, nn.Module]  # name of the metric -> distance
    embedder: nn.Module  # its `embedding` gives the features of the Fréchet distance
    inverse_dynamics: InverseDynamics | None

    @torch.inference_mode()
    def distances(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Every perceptual distance of two batches of pictures [N, 3, Hp, Wp]: [N] on the CPU."""
        found = {}
        for name, distance in self.perceptual.items():
            device = next(distance.parameters()).device
            found[name] = distance(a.to(device), b.to(device)).cpu()
        return found

    @torch.inference_mode()
    def embeddings(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, Hp, Wp] -> features [N, D] on the CPU."""
        return self.embedder.embedding(pictures.to(next(self.embedder.parameters()).device)).cpu()


def load_picture_networks(
    inverse_dynamics: InverseDynamics | None, device: torch.device | str
) -> PictureNetworks:
    """EffNet-Lite0, and LPIPS where its backbone is on disk, on `device`."""
    effnet = EffNetDistance().to(device)
    perceptual = {"perceptual": effnet}
    if lpips_available():
        perceptual["lpips"] = LPIPSDistance().to(device)
    return PictureNetworks(perceptual, effnet, inverse_dynamics)
