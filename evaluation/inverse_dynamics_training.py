"""Training of the inverse-dynamics network, and finding one that fits a data set."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset.actions import ACTION_DIM, CLASS_NAMES, action_class
from dataset.token_files import MANIFEST, ClipEntry, DataError, Manifest, unpack_indices
from dataset.windows import TokenClips
from evaluation.inverse_dynamics import (
    BATCH,
    INVERSE_DYNAMICS_KIND,
    KEYS,
    SHIPPED_INVERSE_DYNAMICS,
    InverseDynamics,
    InverseDynamicsConfig,
    Prediction,
    accuracy,
    labels,
    load,
)
from runtime import checkpoint
from runtime.device import amp_dtype, autocast
from runtime.training_state import FiniteSteps
from runtime.video import VideoError, header_frames, read_frames, resize, to_float

STEPS, PAIRS = 1200, 20_000
LR, WARMUP, WEIGHT_DECAY, GRAD_CLIP = 2e-3, 50, 0.01, 5.0
CLASS_BALANCE = 0.5  # exponent of the inverse class frequency: 0 weighs all pairs equally, 1 all classes
HELD_OUT = 0.1  # share of the clips that are left out of training and measure its accuracy
BRIGHTNESS, CONTRAST = 0.1, 0.25  # largest changes, the same for both pictures of a pair
BLUR, NOISE = 1.0, 0.04  # largest share of a 3x3 mean; largest standard deviation


def readable(directory: Path, entry: ClipEntry, report: bool = True) -> bool:
    """Whether the video of a clip can be opened; with `report` prints why not."""
    try:
        header_frames(directory / entry.video)
    except VideoError as error:
        if report:
            tqdm.write(f"no pictures of {entry.name}: {error}")
        return False
    return True


def read_pairs(
    clips: TokenClips, count: int, seed: int, progress: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Original pictures one kept frame apart, and the actions between them.

    Returns the pictures before and after, [N, Hp, Wp, 3] uint8 each of the manifest's size, and the actions
    [N, 5] float32. N is `count`, or less if the clips are short. All clips have the same number of pairs.
    They are sampled so that all action classes (CLASS_NAMES) are about equally frequent. Each video is
    decoded once, in order. Clips whose video cannot be opened are left out with a message; raises DataError
    if that leaves none.
    """
    usable = [i for i, entry in enumerate(clips.entries) if readable(clips.directory, entry)]
    classes = [action_class(actions) for actions in clips.actions]
    frequency = np.bincount(np.concatenate(classes), minlength=len(CLASS_NAMES))
    rng = np.random.default_rng(seed)
    shares = np.diff(np.linspace(0, count, len(usable) + 1).round().astype(int))
    before, after = np.empty((2, count, *clips.manifest.picture_size, 3), np.uint8)
    actions, n = np.empty((count, ACTION_DIM), np.float32), 0
    bar = tqdm(zip(usable, shares, strict=True), "pairs", len(usable), unit="clip", disable=not progress)
    for clip, share in bar:
        entry, weight = clips.entries[clip], 1 / frequency[classes[clip]]
        share = min(share, len(weight))
        if not share:
            continue
        sampled = np.sort(rng.choice(len(weight), share, replace=False, p=weight / weight.sum()))
        video_frames = np.array(unpack_indices(entry.kept, entry.frames))  # of each frame of tokens
        wanted = np.union1d(video_frames[sampled], video_frames[sampled + 1])
        try:
            pictures = [
                resize(picture, *clips.manifest.picture_size, clips.manifest.resize)
                for picture in read_frames(clips.directory / entry.video, wanted.tolist())
            ]
        except VideoError as error:
            tqdm.write(f"no pictures of {entry.name}: {error}")
            continue
        pictures, new = np.stack(pictures), slice(n, n + share)
        before[new] = pictures[np.searchsorted(wanted, video_frames[sampled])]
        after[new] = pictures[np.searchsorted(wanted, video_frames[sampled + 1])]
        actions[new] = clips.actions[clip][sampled]
        n += share
    if not n:
        raise DataError(
            f"{clips.directory / MANIFEST}: none of the videos it names can be opened; "
            "put the clips back where they were, or preprocess again"
        )
    return before[:n], after[:n], actions[:n]


def mirror(before: Tensor, after: Tensor, targets: dict[str, Tensor], selected: Tensor) -> tuple:
    """Mirrors the pairs `selected` [B] bool left to right, pictures and targets.

    Returns before, after and targets.
    """
    flip = selected[:, None, None, None]
    before, after = (torch.where(flip, pictures.flip(3), pictures) for pictures in (before, after))
    yaw = torch.where(selected, -targets["yaw"], targets["yaw"])
    move_x = torch.where(selected, 2 - targets["move_x"], targets["move_x"])
    return before, after, {**targets, "yaw": yaw, "move_x": move_x}


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Random brightness, contrast, blur and noise for pairs [2, B, 3, H, W] in [0, 1].

    Blur and noise resemble the tokenizer's reconstructions. Only the noise differs within a pair.
    """
    pairs = pictures.shape[1]

    def uniform(low: float, high: float) -> Tensor:
        numbers = torch.rand(1, pairs, 1, 1, 1, generator=generator).to(pictures.device)
        return low + (high - low) * numbers

    pictures = pictures * uniform(1 - CONTRAST, 1 + CONTRAST) + uniform(-BRIGHTNESS, BRIGHTNESS)
    blurred = F.avg_pool2d(F.pad(pictures.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = pictures.lerp(blurred.view_as(pictures), uniform(-0.3, BLUR).clamp_min(0))
    noise = torch.randn(pictures.shape, generator=generator).to(pictures.device)
    return (pictures + noise * uniform(0, NOISE)).clamp(0, 1)


def loss_of(prediction: Prediction, targets: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    """Smooth L1 of the rotation in degrees plus the cross-entropy of each key with class weights."""
    camera = torch.stack([targets["yaw"], targets["pitch"]], 1)
    loss = F.smooth_l1_loss(prediction.camera, camera)
    for name, weight in weights.items():
        loss = loss + F.cross_entropy(getattr(prediction, name), targets[name], weight)
    return loss


def train_inverse_dynamics(
    clips: TokenClips, seed: int, device: torch.device, steps: int = STEPS, pairs: int = PAIRS
) -> tuple[InverseDynamics, dict[str, float]]:
    """Trains on the original pictures of `clips`.

    Returns the network in eval mode and its `accuracy` on held-out clips (empty for a single clip). The
    held-out clips are neighbours in the list, because neighbours often share a world. The result is a
    function of the seed, bit for bit on one CPU thread. Raises DataError if no video can be opened, or for
    pictures whose sides are not divisible by 8.
    """
    usable = [i for i, entry in enumerate(clips.entries) if readable(clips.directory, entry)]
    clips = clips.subset(usable) if usable else clips  # read_pairs raises if there are none
    count = len(clips.entries)
    out = max(1, round(HELD_OUT * count)) if count > 1 else 0
    first = int(np.random.default_rng(seed).integers(count - out + 1))
    held_out = list(range(first, first + out))
    trained = clips.subset([i for i in range(count) if i not in held_out])
    before, after, actions = read_pairs(trained, pairs, seed)

    manifest = clips.manifest
    try:
        config = InverseDynamicsConfig(*manifest.picture_size, manifest.camera_degrees_per_unit)
    except ValueError as error:
        raise DataError(f"{clips.directory / MANIFEST}: {error}; encode the clips at another size") from None
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = InverseDynamics(config)
    model = model.to(device, memory_format=torch.channels_last).train()
    targets = labels(actions, config.degrees_per_unit)
    weights = {}
    for name, classes in KEYS.items():
        frequency = torch.bincount(targets[name], minlength=classes).clamp_min(1)
        weights[name] = (len(actions) / (classes * frequency)).pow(CLASS_BALANCE).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    generator, dtype, finite = torch.Generator().manual_seed(seed), amp_dtype(device), FiniteSteps()
    bar = tqdm(range(steps), desc="inverse dynamics", unit="step")
    for step in bar:
        rate = LR * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.randint(len(actions), (BATCH,), generator=generator)
        pair = [to_float(torch.from_numpy(p[batch.numpy()]).to(device)) for p in (before, after)]
        wanted = {name: values[batch].to(device) for name, values in targets.items()}
        flipped = (torch.rand(BATCH, generator=generator) < 0.5).to(device)
        *pair, wanted = mirror(*pair, wanted, flipped)
        pair = augment(torch.stack(pair), generator)
        with autocast(device, dtype):
            prediction = model(*pair)
        loss = loss_of(prediction, wanted, weights)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        if finite.check(step + 1, float(loss.detach()), float(grad_norm)):
            optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")
    model.eval()
    if not held_out:
        return model, {}
    return model, accuracy(model, *read_pairs(clips.subset(held_out), max(1, pairs // 10), seed + 1))


def data_key(manifest: Manifest, entries: list[ClipEntry]) -> str:
    """16 hex digits that identify training data: names and lengths of the clips, picture size, frame rate,
    field of view and degrees per unit of action."""
    content = [
        sorted((entry.name, entry.frames) for entry in entries),
        manifest.picture_size,
        manifest.fps,
        manifest.camera_degrees_per_unit,
        manifest.vertical_fov_degrees,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def save(path: str | Path, model: InverseDynamics, clips: TokenClips, **extra) -> None:
    """Writes a network trained on `clips`, with `extra` plain values (accuracy, seed, ...)."""
    manifest = clips.manifest
    data = {
        "key": data_key(manifest, clips.entries),
        "clips": len(clips.entries),
        "fps": manifest.fps,
        "vertical_fov_degrees": manifest.vertical_fov_degrees,
    }
    checkpoint.save(path, checkpoint.content_of(INVERSE_DYNAMICS_KIND, model, data=data, **extra))


def check_fit(model: InverseDynamics, manifest: Manifest, path: Path, data_dir: Path) -> None:
    """Raises DataError if the network was trained for another picture size or other units."""
    config = model.config
    for what, expected, found in (
        ("pictures (rows, columns)", [config.height, config.width], manifest.picture_size),
        ("camera_degrees_per_unit", config.degrees_per_unit, manifest.camera_degrees_per_unit),
    ):
        if expected != found:
            raise DataError(
                f"{data_dir / MANIFEST}: {what} {found}, the inverse-dynamics network in {path} expects "
                f"{expected}; to train one for this data, run without --quick and with its videos in place"
            )


def load_or_train(
    data_dir: str | Path, seed: int, device: torch.device, cache: str | Path, train: bool
) -> tuple[InverseDynamics, str]:
    """The network for the tokens in `data_dir`, and a sentence on its origin.

    In this order: the one in the folder `cache`, or the one that ships, if it was trained on exactly this
    training split; with `train` and an open video of the training split a new one, saved in `cache`; the one
    that ships, trained on other data. Raises DataError if that has another picture size or other units,
    CheckpointError if it cannot be read.
    """
    data_dir, shipped = Path(data_dir), SHIPPED_INVERSE_DYNAMICS
    manifest = Manifest.load(data_dir)
    entries = [part[0] for clip in manifest.clips if (part := clip.part("train"))]
    key = data_key(manifest, entries)
    cached = Path(cache) / f"idm_{key}.pt"
    for path in (cached, shipped):
        if path.is_file():
            model, content = load(path, device)
            if content["data"]["key"] == key:
                check_fit(model, manifest, path, data_dir)
                return model, f"{path.name}, trained on this data's {len(entries)} training clips"
    if train and any(readable(data_dir, entry, report=False) for entry in entries):
        clips = TokenClips(data_dir, "train")
        model, held_out_accuracy = train_inverse_dynamics(clips, seed, device)
        save(cached, model, clips, seed=seed, accuracy=held_out_accuracy)
        return load(cached, device)[0], (
            f"{cached.name}, trained now on this data's {len(entries)} training clips"
        )
    model, content = load(shipped, device)
    check_fit(model, manifest, shipped, data_dir)
    data = content["data"]
    origin = f"{shipped.name}, trained on other data ({data['clips']} clips)"
    for name, unit in (("fps", "frames/s"), ("vertical_fov_degrees", "degrees of view")):
        if data[name] != getattr(manifest, name):
            origin += f"; at {data[name]:g} {unit}, here {getattr(manifest, name):g}"
    return model, origin
