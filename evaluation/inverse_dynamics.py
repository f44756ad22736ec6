"""Inverse dynamics: a small network that predicts the action between two consecutive pictures.

evaluate.py applies it to generated pictures and compares its predictions with the commanded actions. It
matches the two pictures by a cost volume, so that it depends on how things move rather than on what they are.
`inverse_dynamics_training` trains it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dataset.actions import DEGREES_PER_UNIT, JUMP, MOVE_X, MOVE_Z, PITCH, YAW
from metrics import confusion, macro_f1
from runtime import checkpoint
from runtime.checkpoint import SHIPPED
from runtime.video import to_float

SHIPPED_INVERSE_DYNAMICS = SHIPPED / "idm.pt"
INVERSE_DYNAMICS_KIND = "inverse_dynamics"
KEYS = {"move_x": 3, "move_z": 3, "jump": 2}  # classes: left none right, back none forward, no yes
BATCH = 64  # pairs of pictures, in training and prediction
MAX_SHIFT = 0.2  # of the picture's width: the largest shift in the cost volume
SHARPNESS = 2.5  # initial log of the factor before the softmax over shifts
POOLED = (
    3,
    4,
)  # rows and columns of pooled features: a step forward moves each part of the picture differently


@dataclass(frozen=True)
class InverseDynamicsConfig:
    """Sizes of the network.

    Pictures are `height` x `width`, both divisible by 8. An action of 1 turned by `degrees_per_unit` in the
    training data. `features` and `hidden` are widths of layers. Raises ValueError for other picture sizes.
    """

    height: int = 72
    width: int = 128
    degrees_per_unit: float = DEGREES_PER_UNIT
    features: int = 32
    hidden: int = 64

    def __post_init__(self):
        if self.height % 8 or self.width % 8 or min(self.height, self.width) < 8:
            raise ValueError(f"pictures of {self.height}x{self.width}: both must be divisible by 8")


class Prediction(NamedTuple):
    """The network's output for B pairs."""

    camera: Tensor  # [B, 2] degrees of yaw (+right) and pitch (+down)
    move_x: Tensor  # [B, 3] logits: left, none, right
    move_z: Tensor  # [B, 3] logits: back, none, forward
    jump: Tensor  # [B, 2] logits: no, yes


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def cost_volume(a: Tensor, b: Tensor, reach: int) -> Tensor:
    """Products of features of `a` [B, C, h, w] with those of `b` [B, C, 2h, 2w], shifted by up to `reach`.

    `a` has every second position of its picture, in both directions. Returns [B, K*K, h, w] with
    K = 2 * reach + 1: channel (dy + reach) * K + dx + reach is the product with the position of `b` that lies
    dy below and dx to the right, 0 beyond the border. Dosovitskiy et al., FlowNet, arXiv 1504.06852,
    section 3.
    """
    batch, _, height, width = a.shape
    size, wide, positions = 2 * reach + 1, b.shape[3] + 2 * reach, height * width
    padded = F.pad(b, (reach, reach, reach, reach)).flatten(2)  # [B, C, M], M positions with the border
    total = padded.shape[2]
    products = torch.bmm(a.flatten(2).transpose(1, 2), padded)  # [B, h*w, M]: all pairs of positions
    # The products within reach lie at regular strides: no loop over shifts, and no copies of the features.
    strides = (positions * total, wide, 1, width * total + 2 * wide, total + 2)  # of B, dy, dx, y, x
    near = products.as_strided((batch, size, size, height, width), strides)
    return near.reshape(batch, size * size, height, width)


class InverseDynamics(nn.Module):
    """Two consecutive pictures -> the action between them."""

    def __init__(self, config: InverseDynamicsConfig):
        super().__init__()
        self.config = config
        features, hidden = config.features, config.hidden
        self.reach = max(2, round(MAX_SHIFT * config.width / 4))
        shift = torch.arange(-self.reach, self.reach + 1) / self.reach
        shifts = torch.stack(torch.meshgrid(shift, shift, indexing="ij")).flatten(1)  # [2, K*K]: dy, dx
        self.register_buffer("shifts", shifts, persistent=False)
        self.eye = nn.Sequential(
            conv(3, features // 2, stride=2),
            conv(features // 2, features, stride=2),
            nn.Conv2d(features, features, 3, padding=1, bias=False),
            nn.BatchNorm2d(
                features, affine=False
            ),  # centred: features that are all positive match everywhere
        )
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS))
        self.where = conv(shifts.shape[1], 32, size=1)
        self.change = nn.Sequential(conv(6, 16, stride=2), conv(16, 24, stride=2), conv(24, 32, stride=2))
        self.trunk = nn.Sequential(
            conv(3 + features + 32 + 32, hidden),
            conv(hidden, hidden),
            conv(hidden, hidden),
            nn.AdaptiveAvgPool2d(POOLED),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(hidden * POOLED[0] * POOLED[1], 2 * hidden),
            nn.ReLU(inplace=True),
            nn.Linear(2 * hidden, 2 + sum(KEYS.values())),
        )

    def forward(self, before: Tensor, after: Tensor) -> Prediction:
        """Pictures [B, 3, H, W] in [0, 1], one frame apart, of the config's size."""
        before, after = before * 2 - 1, after * 2 - 1
        a, b = self.eye(torch.cat([before, after])).chunk(2)  # [B, C, H/4, W/4] each
        a = a[:, :, ::2, ::2]  # every second position is enough for the positions that are matched
        normalized = (F.normalize(f.float(), dim=1).to(f.dtype) for f in (a, b))
        similarity = cost_volume(*normalized, self.reach).float()  # [B, K*K, H/8, W/8] in -1..1
        share = (similarity * self.sharpness.exp()).softmax(1)
        inputs = [
            torch.einsum("bkhw,dk->bdhw", share, self.shifts),  # mean shift of each position
            similarity.amax(1, keepdim=True),  # low where the content left the picture
            self.where(10 * share),
            self.change(torch.cat([before, after], 1)),  # sensitive to shifts of less than a position
            a,
        ]
        outputs = self.head(self.trunk(torch.cat(inputs, 1))).float()
        camera, *keys = outputs.split([2, *KEYS.values()], 1)
        return Prediction(camera * self.config.degrees_per_unit, *keys)


def labels(actions: Tensor | np.ndarray, degrees_per_unit: float = DEGREES_PER_UNIT) -> dict[str, Tensor]:
    """The targets of actions [N, 5]: yaw and pitch [N] float32 in degrees, and classes [N] int64 of move_x,
    move_z and jump (KEYS). A key counts as pressed beyond 0.5, as in `to_gamefactory`."""
    actions = torch.as_tensor(actions).float()

    def direction(axis: Tensor) -> Tensor:
        return 1 + (axis > 0.5).long() - (axis < -0.5).long()

    return {
        "yaw": actions[:, YAW] * degrees_per_unit,
        "pitch": actions[:, PITCH] * degrees_per_unit,
        "move_x": direction(actions[:, MOVE_X]),
        "move_z": direction(actions[:, MOVE_Z]),
        "jump": (actions[:, JUMP] > 0.5).long(),
    }


def _as_float(pictures: np.ndarray | Tensor) -> Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] in [0, 1]; floats [N, 3, H, W] are returned unchanged."""
    pictures = torch.as_tensor(pictures)
    return to_float(pictures) if pictures.dtype == torch.uint8 else pictures


@torch.inference_mode()
def predict(
    model: InverseDynamics, before: np.ndarray | Tensor, after: np.ndarray | Tensor
) -> dict[str, np.ndarray]:
    """N pairs of pictures -> yaw and pitch [N] in degrees, classes [N] of move_x, move_z and jump (KEYS).

    Pictures are [N, H, W, 3] uint8 or [N, 3, H, W] in [0, 1]. The model must be in eval mode.
    """
    device, found = model.sharpness.device, []
    for first in range(0, len(before), BATCH):
        pair = (_as_float(p[first : first + BATCH]).to(device) for p in (before, after))
        found.append(model(*pair))
    camera, *keys = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
    classes = {name: logits.argmax(1) for name, logits in zip(KEYS, keys, strict=True)}
    return {"yaw": camera[:, YAW], "pitch": camera[:, PITCH], **classes}


def accuracy(
    model: InverseDynamics, before: np.ndarray, after: np.ndarray, actions: np.ndarray
) -> dict[str, float]:
    """Mean absolute errors of yaw and pitch in degrees, and macro-F1 of the keys, of N pairs."""
    found, true = predict(model, before, after), labels(actions, model.config.degrees_per_unit)
    errors = {
        f"{name}_deg": float(np.abs(found[name] - true[name].numpy()).mean()) for name in ("yaw", "pitch")
    }
    f1 = {
        f"{name}_f1": macro_f1(confusion(found[name], true[name].numpy(), classes))
        for name, classes in KEYS.items()
    }
    return {**errors, **f1}


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[InverseDynamics, dict]:
    """The network in `path`, frozen and in eval mode, and the checkpoint's whole content.

    Raises CheckpointError if the file is missing, broken or of another kind.
    """
    content = checkpoint.load(path, INVERSE_DYNAMICS_KIND, needed=("data",))
    model = checkpoint.build(InverseDynamics, InverseDynamicsConfig, content, path)
    return model.requires_grad_(False).eval().to(device), content
