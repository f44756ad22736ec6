"""A discriminator of recorded and reconstructed pictures, place by place, on pixels and on frozen features.

Small networks on the features of one that is trained already learn within hundreds of steps what a patch
discriminator (arXiv 1611.07004) needs thousands for: Sauer et al., "Projected GANs Converge Faster", arXiv
2111.01007. Hinge loss: arXiv 1705.02894. No normalization: it would hide a lack of contrast.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from metrics.perceptual import EffNetDistance
from runtime.config import SettingError
from vq_vae.vq_vae import VQVAEConfig

CHANNELS = 48
SLOPE = 0.2  # of the leaky ReLU
LEVELS = 3  # of the features, from the finest on


class Discriminator(nn.Module):
    """Pictures [B, 3, Hp, Wp] in [0, 1] and their features [B, C, h, w] -> scores [B, N], above 0 for
    recorded ones: from the pixels and from each of the first LEVELS features, one for each place."""

    def __init__(self, channels: list[int]):
        """`channels` of the features."""
        super().__init__()
        self.heads = nn.ModuleList(
            head(c, stride) for c, stride in [(3, 2), *((c, 1) for c in channels[:LEVELS])]
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor, features: list[Tensor]) -> Tensor:
        inputs = [pictures * 2 - 1, *features[:LEVELS]]
        return torch.cat([net(x).flatten(1) for net, x in zip(self.heads, inputs, strict=True)], 1)


def build_discriminator(network: EffNetDistance, config: VQVAEConfig) -> Discriminator:
    """A discriminator of a tokenizer's pictures, on the features of `network` and on its device.

    Raises SettingError if the pictures are too small for it.
    """
    side, device = network.least_side, next(network.parameters()).device
    if min(config.height, config.width) < side:
        raise SettingError(
            f"pictures of {config.width}x{config.height}: the discriminator needs {side} pixels a side; give "
            "another tokenizer or ADVERSARIAL_WEIGHT=0"
        )
    with torch.no_grad():
        features = network.features(torch.zeros(1, 3, side, side, device=device), LEVELS)
    return Discriminator([feature.shape[1] for feature in features]).to(device)


def head(channels: int, stride: int) -> nn.Sequential:
    """Scores of places from a map of so many channels."""
    return nn.Sequential(
        nn.Conv2d(channels, CHANNELS, 4 if stride == 2 else 3, stride=stride, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(CHANNELS, CHANNELS, 4, stride=2, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(CHANNELS, 1, 1),
    )


def update_discriminator(optimizer: torch.optim.Optimizer, recorded: Tensor, reconstructed: Tensor) -> Tensor:
    """An optimizer step from the scores of both; returns the loss. One that is not finite changes nothing."""
    loss = discriminator_loss(recorded.float(), reconstructed.float())
    if loss.isfinite():
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return loss.detach()


def discriminator_loss(recorded: Tensor, reconstructed: Tensor) -> Tensor:
    """Hinge loss of the discriminator, from its scores of both."""
    return (F.relu(1 - recorded).mean() + F.relu(1 + reconstructed).mean()) / 2
