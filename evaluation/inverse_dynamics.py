"""Reads the action off two pictures in a row: a small network trained on real pairs.

evaluate.py shows it generated pictures and asks what was done between them; what it answers should be what
was commanded. It looks for where each piece of the first picture went in the second (a cost volume), so that
it goes by how things moved rather than by what they are.

Trained on the tokens' own recordings where they can be opened, and kept; else the one that ships is taken.
"""

import copy
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset.actions import (
    ACTION_DIM,
    CLASS_NAMES,
    DEGREES_PER_UNIT,
    JUMP,
    MOVE_X,
    MOVE_Z,
    PITCH,
    YAW,
    action_class,
)
from dataset.token_files import MANIFEST, ClipEntry, DataError, Manifest, unpack_indices
from dataset.windows import TokenClips
from metrics import confusion, macro_f1
from runtime import checkpoint
from runtime.checkpoint import SHIPPED
from runtime.device import amp_dtype, autocast
from runtime.video import VideoError, header_frames, read_frames, resize, to_float

# Training.
STEPS, PAIRS, BATCH = 1200, 20_000, 64
LR, WARMUP, WEIGHT_DECAY, GRAD_CLIP = 2e-3, 50, 0.01, 5.0
SHIPPED_INVERSE_DYNAMICS = SHIPPED / "idm.pt"
INVERSE_DYNAMICS_KIND = "inverse_dynamics"
BALANCE = 0.5  # of the classes of a key: 0 weighs each pair alike, 1 each class
HELD_BACK = 0.1  # share of the clips that training leaves out and is judged on
BRIGHTNESS, CONTRAST = 0.1, 0.25  # at most, up or down: both pictures of a pair alike
BLUR, NOISE = 1.0, 0.04  # at most: share of the 3x3 mean; standard deviation

KEYS = {"move_x": 3, "move_z": 3, "jump": 2}  # classes: left none right, back none forward, no yes
REACH = 0.2  # of the picture's width: the largest shift that is looked for
SHARPNESS = 2.5  # log of how sharply the best fit is told from the others, at the start of training
PARTS = (3, 4)  # rows and columns whose features are kept apart: a step forward moves each its own way


# ---------------------------------------------------------------- the network


@dataclass(frozen=True)
class InverseDynamicsConfig:
    """Pictures are `height` x `width`, both divisible by 8; an action of 1 turned by `degrees_per_unit` in
    what it learned from; `features` and `hidden` are the widths of its layers."""

    height: int = 72
    width: int = 128
    degrees_per_unit: float = DEGREES_PER_UNIT
    features: int = 32
    hidden: int = 64

    def __post_init__(self):
        if self.height % 8 or self.width % 8 or min(self.height, self.width) < 8:
            raise ValueError(f"pictures of {self.height}x{self.width}: both must be divisible by 8")


class Prediction(NamedTuple):
    """What the network answers for B pairs."""

    camera: Tensor  # [B, 2] degrees of yaw (+right) and pitch (+down)
    move_x: Tensor  # [B, 3] logits: left, none, right
    move_z: Tensor  # [B, 3] logits: back, none, forward
    jump: Tensor  # [B, 2] logits: no, yes


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution, normalised and rectified."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def cost_volume(a: Tensor, b: Tensor, reach: int) -> Tensor:
    """How well cells of `a` [B, C, h, w] fit those of `b` [B, C, 2h, 2w] up to `reach` away: [B, K*K, h, w].

    `a` has every second cell of its picture, in both directions; K is 2 * reach + 1. Channel
    (dy + reach) * K + dx + reach is the product with the cell of `b` that lies dy below and dx to the right,
    0 beyond the border. Dosovitskiy et al., FlowNet, arXiv 1504.06852, section 3.
    """
    batch, _, height, width = a.shape
    size, wide, cells = 2 * reach + 1, b.shape[3] + 2 * reach, height * width
    padded = F.pad(b, (reach, reach, reach, reach)).flatten(2)  # [B, C, M], M cells with the border
    every = padded.shape[2]
    fits = torch.bmm(a.flatten(2).transpose(1, 2), padded)  # [B, h*w, M]: every cell with every other
    # The near ones lie at regular places: no loop over the shifts, and no copy of the features for each.
    strides = (cells * every, wide, 1, width * every + 2 * wide, every + 2)  # of B, dy, dx, y, x
    near = fits.as_strided((batch, size, size, height, width), strides)
    return near.reshape(batch, size * size, height, width)


class InverseDynamics(nn.Module):
    """Two pictures in a row -> the action between them."""

    def __init__(self, config: InverseDynamicsConfig):
        super().__init__()
        self.config = config
        features, hidden = config.features, config.hidden
        self.reach = max(2, round(REACH * config.width / 4))
        shift = torch.arange(-self.reach, self.reach + 1) / self.reach
        shifts = torch.stack(torch.meshgrid(shift, shift, indexing="ij")).flatten(1)  # [2, K*K]: dy, dx
        self.register_buffer("shifts", shifts, persistent=False)
        self.eye = nn.Sequential(
            conv(3, features // 2, stride=2),
            conv(features // 2, features, stride=2),
            nn.Conv2d(features, features, 3, padding=1, bias=False),
            nn.BatchNorm2d(features, affine=False),  # features that are all positive would fit everywhere
        )
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS))
        self.where = conv(shifts.shape[1], 32, size=1)
        self.change = nn.Sequential(conv(6, 16, stride=2), conv(16, 24, stride=2), conv(24, 32, stride=2))
        self.trunk = nn.Sequential(
            conv(3 + features + 32 + 32, hidden),
            conv(hidden, hidden),
            conv(hidden, hidden),
            nn.AdaptiveAvgPool2d(PARTS),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(hidden * PARTS[0] * PARTS[1], 2 * hidden),
            nn.ReLU(inplace=True),
            nn.Linear(2 * hidden, 2 + sum(KEYS.values())),
        )

    def forward(self, before: Tensor, after: Tensor) -> Prediction:
        """Pictures [B, 3, H, W] in [0, 1], one frame apart, of the config's size."""
        before, after = before * 2 - 1, after * 2 - 1
        a, b = self.eye(torch.cat([before, after])).chunk(2)  # [B, C, H/4, W/4] each
        a = a[:, :, ::2, ::2]  # what is looked for may lie sparser than where it is looked for
        directions = (F.normalize(f.float(), dim=1).to(f.dtype) for f in (a, b))
        fits = cost_volume(*directions, self.reach).float()  # [B, K*K, H/8, W/8] in -1..1
        share = (fits * self.sharpness.exp()).softmax(1)
        seen = [
            torch.einsum("bkhw,dk->bdhw", share, self.shifts),  # where each piece went
            fits.amax(1, keepdim=True),  # nothing fits what went out of view
            self.where(10 * share),
            self.change(torch.cat([before, after], 1)),  # shifts of less than a cell
            a,
        ]
        answers = self.head(self.trunk(torch.cat(seen, 1))).float()
        camera, *keys = answers.split([2, *KEYS.values()], 1)
        return Prediction(camera * self.config.degrees_per_unit, *keys)


# ---------------------------------------------------------------- asking it


def labels(actions: Tensor | np.ndarray, degrees_per_unit: float = DEGREES_PER_UNIT) -> dict[str, Tensor]:
    """What the network should answer for actions [N, 5]: yaw and pitch [N] float32 in degrees, and the
    classes [N] int64 of move_x, move_z and jump (KEYS). A key is pressed beyond 0.5, as in `to_gamefactory`.
    """
    actions = torch.as_tensor(actions).float()

    def side(axis: Tensor) -> Tensor:
        return 1 + (axis > 0.5).long() - (axis < -0.5).long()

    return {
        "yaw": actions[:, YAW] * degrees_per_unit,
        "pitch": actions[:, PITCH] * degrees_per_unit,
        "move_x": side(actions[:, MOVE_X]),
        "move_z": side(actions[:, MOVE_Z]),
        "jump": (actions[:, JUMP] > 0.5).long(),
    }


def _as_float(pictures: np.ndarray | Tensor) -> Tensor:
    """[N, H, W, 3] uint8, or [N, 3, H, W] in [0, 1] as it is -> [N, 3, H, W] in [0, 1]."""
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


def figures(model: InverseDynamics, before: np.ndarray, after: np.ndarray, actions: np.ndarray) -> dict:
    """How well it reads N pairs: mean absolute errors of yaw and pitch in degrees, macro-F1 of the keys."""
    found, asked = predict(model, before, after), labels(actions, model.config.degrees_per_unit)
    errors = {f"{n}_deg": float(np.abs(found[n] - asked[n].numpy()).mean()) for n in ("yaw", "pitch")}
    f1 = {
        f"{name}_f1": macro_f1(confusion(found[name], asked[name].numpy(), classes))
        for name, classes in KEYS.items()
    }
    return {**errors, **f1}


# ---------------------------------------------------------------- pairs of real pictures


def _some(clips: TokenClips, chosen: list[int]) -> TokenClips:
    """The same with only the clips `chosen`."""
    some = copy.copy(clips)
    for name in ("entries", "tokens", "actions", "pose"):
        setattr(some, name, [getattr(clips, name)[i] for i in chosen])
    return some


def _can_be_opened(directory: Path, entry: ClipEntry, say: bool = True) -> bool:
    """False, with a message, if a clip's video is not there or is none."""
    try:
        header_frames(directory / entry.video)
    except VideoError as error:
        if say:
            tqdm.write(f"no pictures of {entry.name}: {error}")
        return False
    return True


def read_pairs(
    clips: TokenClips, count: int, seed: int, progress: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Real pictures one kept frame apart, and the actions between them: before and after, each
    [N, Hp, Wp, 3] uint8 of the manifest's size, and [N, 5] float32. N is `count`, less if clips are short.

    As many from each clip, drawn so that every class of action (CLASS_NAMES) is about as frequent as every
    other: few frames are a jump or a look. Each video is decoded once, in order. Clips whose video cannot be
    opened are left out with a message; raises DataError where that leaves none.
    """
    usable = [i for i, entry in enumerate(clips.entries) if _can_be_opened(clips.directory, entry)]
    classes = [action_class(actions) for actions in clips.actions]
    often = np.bincount(np.concatenate(classes), minlength=len(CLASS_NAMES))
    rng = np.random.default_rng(seed)
    shares = np.diff(np.linspace(0, count, len(usable) + 1).round().astype(int))
    before, after = np.empty((2, count, *clips.manifest.picture_size, 3), np.uint8)
    actions, n = np.empty((count, ACTION_DIM), np.float32), 0
    bar = tqdm(zip(usable, shares, strict=True), "pairs", len(usable), unit="clip", disable=not progress)
    for clip, share in bar:
        entry, chance = clips.entries[clip], 1 / often[classes[clip]]
        share = min(share, len(chance))
        if not share:
            continue
        chosen = np.sort(rng.choice(len(chance), share, replace=False, p=chance / chance.sum()))
        frame = np.array(unpack_indices(entry.kept, entry.frames))  # in the video, of each frame of tokens
        wanted = np.union1d(frame[chosen], frame[chosen + 1])
        try:
            found = [
                resize(picture, *clips.manifest.picture_size, clips.manifest.resize)
                for picture in read_frames(clips.directory / entry.video, wanted.tolist())
            ]
        except VideoError as error:
            tqdm.write(f"no pictures of {entry.name}: {error}")
            continue
        found, new = np.stack(found), slice(n, n + share)
        before[new] = found[np.searchsorted(wanted, frame[chosen])]
        after[new] = found[np.searchsorted(wanted, frame[chosen + 1])]
        actions[new] = clips.actions[clip][chosen]
        n += share
    if not n:
        raise DataError(
            f"{clips.directory / MANIFEST}: none of the videos it names can be opened; "
            "put the clips back where they were, or preprocess again"
        )
    return before[:n], after[:n], actions[:n]


# ---------------------------------------------------------------- training


def mirror(before: Tensor, after: Tensor, targets: dict[str, Tensor], which: Tensor) -> tuple:
    """The pairs `which` [B] bool as seen in a mirror, where they turn and go the other way; the rest as they
    are. -> before, after, targets."""
    flip = which[:, None, None, None]
    before, after = (torch.where(flip, pictures.flip(3), pictures) for pictures in (before, after))
    yaw = torch.where(which, -targets["yaw"], targets["yaw"])
    move_x = torch.where(which, 2 - targets["move_x"], targets["move_x"])
    return before, after, {**targets, "yaw": yaw, "move_x": move_x}


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pairs [2, B, 3, H, W] in [0, 1] in another light, and a little blurred and noisy, as decoders paint."""
    pairs = pictures.shape[1]

    def some(low: float, high: float) -> Tensor:
        drawn = torch.rand(1, pairs, 1, 1, 1, generator=generator).to(pictures.device)
        return low + (high - low) * drawn

    pictures = pictures * some(1 - CONTRAST, 1 + CONTRAST) + some(-BRIGHTNESS, BRIGHTNESS)
    blurred = F.avg_pool2d(F.pad(pictures.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = pictures.lerp(blurred.view_as(pictures), some(-0.3, BLUR).clamp_min(0))
    noise = torch.randn(pictures.shape, generator=generator).to(pictures.device)
    return (pictures + noise * some(0, NOISE)).clamp(0, 1)


def loss_of(found: Prediction, targets: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    """Smooth L1 of the turn in degrees and the cross-entropies of the keys, their classes weighted."""
    camera = torch.stack([targets["yaw"], targets["pitch"]], 1)
    loss = F.smooth_l1_loss(found.camera, camera)
    for name, weight in weights.items():
        loss = loss + F.cross_entropy(getattr(found, name), targets[name], weight)
    return loss


def train_idm(
    clips: TokenClips, seed: int, device: torch.device, steps: int = STEPS, pairs: int = PAIRS
) -> tuple[InverseDynamics, dict]:
    """Trains on the real pictures of `clips`; -> the network in eval mode, and its `figures` on clips that it
    was not trained on (none where there is but one clip).

    The clips left out are neighbours in the list: those of one world often are, and so are left out together.
    A function of the seed, bit for bit on one CPU thread. Raises DataError if no video can be opened.
    """
    there = [i for i, entry in enumerate(clips.entries) if _can_be_opened(clips.directory, entry)]
    clips = _some(clips, there) if there else clips  # read_pairs says it where there are none
    count = len(clips.entries)
    aside = max(1, round(HELD_BACK * count)) if count > 1 else 0
    first = int(np.random.default_rng(seed).integers(count - aside + 1))
    held = list(range(first, first + aside))
    before, after, actions = read_pairs(_some(clips, [i for i in range(count) if i not in held]), pairs, seed)

    manifest = clips.manifest
    config = InverseDynamicsConfig(*manifest.picture_size, manifest.camera_degrees_per_unit)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = InverseDynamics(config)
    model = model.to(device, memory_format=torch.channels_last).train()
    targets = labels(actions, config.degrees_per_unit)
    weights = {}
    for name, classes in KEYS.items():
        often = torch.bincount(targets[name], minlength=classes).clamp_min(1)
        weights[name] = (len(actions) / (classes * often)).pow(BALANCE).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    generator, dtype = torch.Generator().manual_seed(seed), amp_dtype(device)
    bar = tqdm(range(steps), desc="inverse dynamics", unit="step")
    for step in bar:
        rate = LR * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(actions), (BATCH,), generator=generator)
        pair = [to_float(torch.from_numpy(p[chosen.numpy()]).to(device)) for p in (before, after)]
        wanted = {name: values[chosen].to(device) for name, values in targets.items()}
        flipped = (torch.rand(BATCH, generator=generator) < 0.5).to(device)
        *pair, wanted = mirror(*pair, wanted, flipped)
        pair = augment(torch.stack(pair), generator)
        with autocast(device, dtype):
            found = model(*pair)
        loss = loss_of(found, wanted, weights)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")
    model.eval()
    if not held:
        return model, {}
    return model, figures(model, *read_pairs(_some(clips, held), max(1, pairs // 10), seed + 1))


# ---------------------------------------------------------------- keeping it


def _key(manifest: Manifest, entries: list[ClipEntry]) -> str:
    content = [
        sorted((entry.name, entry.frames) for entry in entries),
        manifest.picture_size,
        manifest.fps,
        manifest.camera_degrees_per_unit,
        manifest.vertical_fov_degrees,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def key(clips: TokenClips) -> str:
    """16 hex digits that change with what a network learns from `clips`: their names and lengths, the size of
    the pictures, frame rate, field of view and what an action of 1 is."""
    return _key(clips.manifest, clips.entries)


def save(path: str | Path, model: InverseDynamics, clips: TokenClips, **extra) -> None:
    """Writes a network trained on `clips`, with `extra` plain values (its figures, seed, steps, ...)."""
    manifest = clips.manifest
    learned = {
        "key": key(clips),
        "clips": len(clips.entries),
        "fps": manifest.fps,
        "vertical_fov_degrees": manifest.vertical_fov_degrees,
    }
    checkpoint.save(path, checkpoint.content_of(INVERSE_DYNAMICS_KIND, model, data=learned, **extra))


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[InverseDynamics, dict]:
    """The network in `path`, frozen, in eval mode, and the checkpoint's whole content.

    Raises CheckpointError if the file is missing, broken or of another kind.
    """
    content = checkpoint.load(path, INVERSE_DYNAMICS_KIND)
    model = checkpoint.build(InverseDynamics, InverseDynamicsConfig, content, path)
    return model.requires_grad_(False).eval().to(device), content


def _check_fit(model: InverseDynamics, manifest: Manifest, path: Path, data_dir: Path) -> None:
    """Raises DataError if the network was made for other pictures or other units."""
    config = model.config
    for what, made_for, found in (
        ("pictures (rows, columns)", [config.height, config.width], manifest.picture_size),
        ("degrees of an action of 1", config.degrees_per_unit, manifest.camera_degrees_per_unit),
    ):
        if made_for != found:
            raise DataError(
                f"{data_dir / MANIFEST}: {what} {found}, the inverse-dynamics network in {path} is for "
                f"{made_for}; let one be trained for this data: its videos must be there, and no --quick"
            )


def load_or_train(
    data_dir: str | Path, seed: int, device: torch.device, cache: str | Path, train: bool
) -> tuple[InverseDynamics, str]:
    """The network for the tokens in `data_dir`, and in words where it is from.

    The one in the folder `cache` that was trained on exactly its training split; else the one that ships, if
    that was; else, if `train` and a video of the training split can be opened, a new one, which is then kept
    in `cache`; else the one that ships, trained on other data. Raises DataError if that is for pictures of
    another size or other units, CheckpointError if it cannot be read.
    """
    data_dir, shipped = Path(data_dir), SHIPPED_INVERSE_DYNAMICS
    manifest = Manifest.load(data_dir)
    entries = [entry for entry in manifest.clips if entry.split == "train"]
    wanted = _key(manifest, entries)
    kept = Path(cache) / f"idm_{wanted}.pt"
    for path in (kept, shipped):
        if path.is_file():
            model, content = load(path, device)
            if content["data"]["key"] == wanted:
                _check_fit(model, manifest, path, data_dir)
                return model, f"{path.name}, trained on this data's {len(entries)} training clips"
    if train and any(_can_be_opened(data_dir, entry, say=False) for entry in entries):
        clips = TokenClips(data_dir, "train")
        model, held_back = train_idm(clips, seed, device)
        save(kept, model, clips, seed=seed, figures=held_back)
        return load(kept, device)[0], f"{kept.name}, trained now on this data's {len(entries)} training clips"
    model, content = load(shipped, device)
    _check_fit(model, manifest, shipped, data_dir)
    learned = content["data"]
    source = f"{shipped.name}, trained on other data ({learned['clips']} clips)"
    for name, unit in (("fps", "frames/s"), ("vertical_fov_degrees", "degrees of view")):
        if learned[name] != getattr(manifest, name):
            source += f"; at {learned[name]:g} {unit}, here {getattr(manifest, name):g}"
    return model, source
