"""The world to roll out, and the recordings that rollouts start from: token files, pictures and clips."""

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.actions import ACTION_DIM, DEGREES_PER_UNIT, ActionError
from dataset.recordings import (
    ClipError,
    gamefactory_actions,
    kept_steps,
    pool_between,
    read_gamefactory_entries,
    read_pose,
)
from dataset.token_files import MANIFEST, DataError, Manifest, read_token_file, with_first_pose
from depth.predictor import SHIPPED_DEPTH
from rollout.rollout import Rollout
from rollout.world_model import WorldModel, load_world_model
from runtime.checkpoint import SHIPPED, CheckpointError
from runtime.device import amp_dtype, pick_device
from runtime.video import read_frames, read_image, resize, to_uint8, video_fps
from vq_vae.tokenizer import Tokenizer, check_tokenizer, load_tokenizer

DEFAULT_FPS = 16.0  # of a checkpoint that does not name its frame rate
START_PLACES = SHIPPED / "starts"  # token files with a manifest
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class World:
    """A world model on its device, and the units of the data that it was trained on."""

    model: WorldModel
    device: torch.device
    dtype: torch.dtype  # of autocast
    fps: float  # frames per second
    degrees_per_unit: float  # camera turn between two frames at an action of 1

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the world model."""
        return self.model.tokenizer


def load_world(
    checkpoint: str | Path,
    vqvae_ckpt: str | Path,
    device: str = "auto",
    precision: str = "auto",
    depth_ckpt: str | Path = SHIPPED_DEPTH,
) -> World:
    """The world model in `checkpoint` with the tokenizer in `vqvae_ckpt` and, if it is a geometry model, the
    depth network in `depth_ckpt`.

    Raises CheckpointError if a file is missing or broken, or if they do not belong together; DeviceError if
    the device does not exist.
    """
    torch_device = pick_device(device)
    tokenizer = load_tokenizer(vqvae_ckpt, torch_device)
    model, content = load_world_model(checkpoint, tokenizer, torch_device, depth_ckpt)
    try:
        data = content.get("data", {})
        fps = float(data.get("fps", DEFAULT_FPS))
        degrees_per_unit = float(data.get("camera_degrees_per_unit", DEGREES_PER_UNIT))
        right = 0 < fps < 1000 and 0 < degrees_per_unit < 1e4
    except (AttributeError, TypeError, ValueError, OverflowError):
        right = False
    if not right:
        raise CheckpointError(
            f"{checkpoint}: its data names no frame rate and camera unit above 0; copy or train it again"
        )
    return World(model, torch_device, amp_dtype(torch_device, precision), fps, degrees_per_unit)


@dataclass(frozen=True)
class Recording:
    """Recorded frames as tokens [K, H, W] int64, the actions [K-1, 5] float32 between them, and their poses
    [K, 5] (x, y, z, yaw, pitch in metres and degrees; NaN where unknown)."""

    name: str
    tokens: Tensor
    actions: Tensor
    pose: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, frames: int) -> "Recording":
        """The first `frames` frames; all of them if it is 0 or the recording has no more."""
        frames = min(frames or len(self), len(self))
        return Recording(self.name, self.tokens[:frames], self.actions[: frames - 1], self.pose[:frames])

    def last(self, frames: int) -> "Recording":
        """The last `frames` frames, at least one."""
        start = len(self) - frames
        return Recording(self.name, self.tokens[start:], self.actions[start:], self.pose[start:])


def start_places(folder: Path = START_PLACES) -> dict[str, Path]:
    """The start places in a folder, by default those that ship: name -> token file. Raises DataError."""
    manifest = Manifest.load(folder)
    return {clip.name: folder / clip.file for clip in manifest.clips}


def load_recording(path: Path, world: World, frames: int | None = None) -> Recording:
    """The recording in a token file, a picture or a clip. Of a clip at most `frames` frames are decoded.

    Raises DataError, VideoError, ActionError or CheckpointError.
    """
    if path.suffix == ".npz":
        return load_token_file(path, world)
    if path.suffix.lower() in PICTURE_ENDINGS:
        return load_picture(path, world)
    return load_clip(path, world, frames)


def load_token_file(path: Path, world: World) -> Recording:
    """A token file that fits the world.

    Raises CheckpointError if the manifest beside it names another tokenizer, DataError if the file is broken
    or its grid, codes or frame rate are not those of the world.
    """
    content = read_token_file(path, codes=world.tokenizer.config.codebook_size)
    if (path.parent / MANIFEST).is_file():
        manifest = Manifest.load(path.parent)
        check_tokenizer(
            world.tokenizer.fingerprint,
            manifest.tokenizer,
            str(path),
            f"{world.tokenizer.path} (--vqvae_ckpt)",
        )
        if not math.isclose(manifest.fps, world.fps, rel_tol=0.02):
            raise DataError(
                f"{path}: recorded at {manifest.fps:g} frames/s, but the world was trained at {world.fps:g}; "
                f"encode the clips again with preprocess.py --fps_target {world.fps:g}"
            )
    tokens = torch.from_numpy(content["tokens"].astype(np.int64))
    config = world.tokenizer.config
    if not len(tokens):
        raise DataError(f"{path}: contains no frame; delete it and run preprocess.py again")
    if tuple(tokens.shape[1:]) != config.latent_size or tokens.max() >= config.codebook_size:
        raise DataError(
            f"{path}: grid {list(tokens.shape[1:])} with codes up to {int(tokens.max())}, but the tokenizer "
            f"{world.tokenizer.path} has grid {list(config.latent_size)} and {config.codebook_size} codes; "
            "give files that belong together"
        )
    actions = content["actions"]
    pose = with_first_pose(content["pose"], actions, world.degrees_per_unit)
    return Recording(path.name, tokens, torch.from_numpy(actions), torch.from_numpy(pose))


def load_picture(path: Path, world: World) -> Recording:
    """A picture of any size as a recording of one frame. Raises VideoError if it cannot be read."""
    picture = resize_picture(read_image(path), world)
    tokens = world.tokenizer.encode_frames(picture[None])
    return Recording(path.name, tokens, torch.zeros(0, ACTION_DIM), torch.full((1, 5), torch.nan))


def load_clip(path: Path, world: World, frames: int | None = None) -> Recording:
    """A clip, encoded, with the actions recorded with it, at the frame rate of the world.

    At most `frames` frames. A clip without recorded actions gives its first frame only, because the actions
    between its frames are unknown. Raises VideoError or ActionError.
    """
    metadata = find_metadata(path)
    if metadata is None:
        print(f"{path}: no NAME.json with actions beside it or in ../metadata; only the first frame is used")
        recorded, pose = np.zeros((0, ACTION_DIM), np.float32), np.full((1, 5), np.nan, np.float32)
    else:
        recorded, pose = read_metadata(metadata)
    step = max(1, round(video_fps(path) / world.fps))
    kept = kept_steps(len(recorded) + 1, 0, step)[:frames]
    pictures = [resize_picture(frame, world) for frame in islice(read_frames(path), 0, kept[-1] + 1, step)]
    kept = kept[: len(pictures)]  # a video may end before its actions do
    actions = pool_between(recorded, kept, world.degrees_per_unit)
    pose = with_first_pose(pose[kept], actions, world.degrees_per_unit)
    return Recording(
        path.name,
        world.tokenizer.encode_frames(np.stack(pictures)),
        torch.from_numpy(actions),
        torch.from_numpy(pose),
    )


def find_metadata(clip: Path) -> Path | None:
    """NAME.json of a clip NAME.mp4, beside it or in ../metadata (GF-Minecraft's layout); None without one."""
    beside = clip.with_suffix(".json")
    candidates = (beside, clip.parent.parent / "metadata" / beside.name)
    return next((path for path in candidates if path.is_file()), None)


def read_metadata(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The actions [N, 5] in a clip's metadata and the poses of its frames [N+1, 5], NaN where unknown.

    Row t of the actions leads from frame t to frame t+1. Raises ActionError if the file or an entry cannot be
    read.
    """
    try:
        entries = read_gamefactory_entries(path)
    except ClipError as error:
        raise ActionError(f"{error.detail}; this is not a clip's metadata: repair or remove it") from None
    actions = gamefactory_actions(entries, path)
    # Entry "0" belongs to no frame, so the pose of frame 0 is unknown.
    poses = [read_pose(entries[str(k)]) for k in range(1, len(actions) + 1)]
    return actions, np.stack([np.full(5, np.nan, np.float32), *poses])


def resize_picture(picture: np.ndarray, world: World) -> np.ndarray:
    """A picture of any size [h, w, 3] at the tokenizer's size [Hp, Wp, 3]; the aspect ratio may change."""
    height, width = world.tokenizer.config.height, world.tokenizer.config.width
    # Area averaging suits shrinking, but shows blocks when magnifying.
    magnify = picture.shape[0] < height or picture.shape[1] < width
    return resize(picture, height, width, "bicubic" if magnify else "area")


def decode(tokens: Tensor, world: World) -> Tensor:
    """Tokens [K, H, W] -> pictures [K, Hp, Wp, 3] uint8 on the CPU."""
    return torch.cat([to_uint8(part) for part in world.tokenizer.decode_frames(tokens, world.dtype)])


def prime(rollout: Rollout, contexts: list[Recording]) -> None:
    """Primes a rollout of B worlds on B contexts of equal length."""
    rollout.prime(
        torch.stack([context.tokens for context in contexts]),
        torch.stack([context.actions for context in contexts]),
        torch.stack([context.pose for context in contexts]),
    )
