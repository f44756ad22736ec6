"""What every rollout starts from: the tokenizer, the world model, and a recording to prime it on.

The flags that set them are here too, so that inference.py and live_inference.py mean the same by them.
`python start.py TOKENS OUT NAME=CLIP:FRAME ...` cuts start places like those that ship out of token files.
"""

import argparse
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
from dataset.token_files import (
    MANIFEST,
    DataError,
    Manifest,
    read_token_file,
    with_first_pose,
)
from rollout.rollout import Rollout
from rollout.sampling import PLAY, SamplingConfig
from rollout.world_model import SHIPPED_WORLD, WorldModel, load_world_model
from runtime import checkpoint
from runtime.config import non_negative_int, positive_float, positive_int
from runtime.device import amp_dtype, pick_device
from runtime.video import read_frames, read_image, resize, to_uint8, video_fps
from vq_vae.tokenizer import SHIPPED_TOKENIZER, Tokenizer, check_tokenizer, load_tokenizer

DEFAULT_FPS = 16.0
CONTEXT_FRAMES = 16
PLACES = checkpoint.SHIPPED / "starts"  # the start places that ship: token files with a manifest
ENCODE_BATCH = 64
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class World:
    """A tokenizer and a world model that go together, and the units of the data they learned from."""

    model: WorldModel
    device: torch.device
    dtype: torch.dtype
    fps: float  # frames a second
    degrees_per_unit: float  # turn between two frames when the action is 1

    @property
    def tokenizer(self) -> Tokenizer:
        """The world model's."""
        return self.model.tokenizer


@dataclass(frozen=True)
class Recording:
    """Frames that were really seen and the actions between them: tokens [K, H, W] int64, actions [K-1, 5]
    float32; and from where they were seen [K, 5], NaN where unknown."""

    name: str
    tokens: Tensor
    actions: Tensor
    pose: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, frames: int) -> "Recording":
        """The first `frames` frames; all of them if it is 0 or there are no more."""
        frames = min(frames or len(self), len(self))
        pose = None if self.pose is None else self.pose[:frames]
        return Recording(self.name, self.tokens[:frames], self.actions[: frames - 1], pose)

    def last(self, frames: int) -> "Recording":
        """The last `frames` frames, of one or more."""
        first = len(self) - frames
        pose = None if self.pose is None else self.pose[first:]
        return Recording(self.name, self.tokens[first:], self.actions[first:], pose)

    @property
    def known_pose(self) -> Tensor:
        """`pose`, NaN everywhere if there is none."""
        return torch.full((len(self), 5), torch.nan) if self.pose is None else self.pose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every script that rolls the world out has."""
    add = parser.add_argument
    add("--checkpoint", type=Path, default=SHIPPED_WORLD, help="world model (default: the one that ships)")
    add("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="its tokenizer (default: ships)")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--start",
        nargs="+",
        metavar="START",
        help=f"a place that ships ({', '.join(places())} or all), a picture, a token file, or a clip, whose "
        "actions are in NAME.json beside it or in ../metadata (default: the places that ship)",
    )
    begin.add_argument("--context_npz", nargs="+", metavar="NPZ", help="token files to start from")
    add(
        "--context_frames",
        "--warmup",
        type=non_negative_int,
        default=CONTEXT_FRAMES,
        help="prime the world on so many first frames of the start, 0: all of them (default: %(default)s). "
        "Both names mean the same",
    )
    add_sampling_arguments(parser)
    add("--seed", type=non_negative_int, default=0, help="same seed, same rollout (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: auto")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags by which tokens are chosen."""
    add = parser.add_argument
    add("--greedy", action="store_true", help="always take the likeliest token, instead of sampling")
    add(
        "--temperature",
        type=positive_float,
        default=PLAY.temperature,
        help="of what comes into view; lower: safer, higher: wilder (default: %(default)s)",
    )
    add(
        "--topk",
        type=non_negative_int,
        default=0,
        help="sample among the k likeliest tokens, 0: all (default: 0)",
    )
    add(
        "--topp",
        type=float,
        default=PLAY.top_p,
        help="among the likeliest that make up this share (default: %(default)s)",
    )
    add(
        "--trust",
        type=float,
        default=PLAY.trust,
        help="in what was seen before, more than learnt (default: %(default)s)",
    )
    add(
        "--continuation",
        type=float,
        default=PLAY.continuation,
        help="of what was seen into what comes into view, more than learnt (default: %(default)s)",
    )
    add(
        "--redraw",
        type=float,
        default=PLAY.redraw,
        help="draw anew what is enlarged so far that less than this share of its cell fills one, by length "
        "(default: %(default)s)",
    )
    add(
        "--passes",
        type=positive_int,
        default=PLAY.passes,
        help="of masked parallel decoding, 1: the plain head (default: %(default)s)",
    )


def sampling_config_of(args: argparse.Namespace) -> SamplingConfig:
    """How tokens are chosen by these flags. Raises ValueError where a number is out of its range."""
    return SamplingConfig(
        args.greedy, args.temperature, args.topk, args.topp, passes=args.passes, trust=args.trust,
        continuation=args.continuation, redraw=args.redraw,
    )  # fmt: skip


def load_world(args: argparse.Namespace) -> World:
    """The tokenizer and world model that the flags name, on the device they name.

    Raises CheckpointError if a file is missing or broken, or if the two do not go together.
    """
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.vqvae_ckpt, device)
    model, content = load_world_model(args.checkpoint, tokenizer, device)
    learned = content.get("data", {})
    return World(
        model,
        device,
        amp_dtype(device, args.precision),
        float(learned.get("fps", DEFAULT_FPS)),
        float(learned.get("camera_degrees_per_unit", DEGREES_PER_UNIT)),
    )


def places() -> dict[str, Path]:
    """The start places that ship: name -> token file."""
    manifest = Manifest.load(PLACES)
    return {clip.name: PLACES / clip.file for clip in manifest.clips}


def starts(args: argparse.Namespace) -> list[Path]:
    """The files that --start or --context_npz names; without either, the places that ship."""
    known, found = places(), []
    for word in args.start or args.context_npz or ["all"]:
        if word == "all":
            found += known.values()
        elif word in known:
            found.append(known[word])
        elif not Path(word).suffix:
            raise DataError(f"--start {word}: no such place; give a file, or one of {', '.join(known)}, all")
        else:
            found.append(Path(word))
    return found


def load_recording(path: Path, world: World, frames: int | None = None) -> Recording:
    """The recording in a token file, a picture or a clip; of a clip no more than `frames` frames are decoded.

    Raises DataError, VideoError, ActionError or CheckpointError.
    """
    if path.suffix == ".npz":
        return read_tokens(path, world)
    if path.suffix.lower() in PICTURE_ENDINGS:
        picture = to_size(read_image(path), world)
        return Recording(path.name, world.tokenizer.encode_frames(picture[None]), torch.zeros(0, ACTION_DIM))
    return read_clip(path, world, frames)


def rollout_of(world: World, args: argparse.Namespace) -> Rollout:
    """A rollout that chooses its tokens as the flags say; it has yet to be primed."""
    return Rollout(world.model, sampling_config_of(args), args.seed, world.dtype)


def prime(rollout: Rollout, contexts: list[Recording]) -> None:
    """Shows a rollout of as many worlds what was really seen in each; contexts of one length."""
    shown = (
        torch.stack([getattr(c, name) for c in contexts]) for name in ("tokens", "actions", "known_pose")
    )
    rollout.prime(*shown)


def read_tokens(path: Path, world: World) -> Recording:
    """A token file, if it fits the world.

    Raises CheckpointError if a manifest beside it says that another tokenizer made it, DataError if it is
    broken or its grid, codes or frame rate are not the world's.
    """
    content = read_token_file(path)
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
                f"{path}: recorded at {manifest.fps:g} frames/s, the world was trained at {world.fps:g}; "
                f"encode the clips again with preprocess.py --fps_target {world.fps:g}"
            )
    tokens = torch.from_numpy(content["tokens"].astype(np.int64))
    config = world.tokenizer.config
    if not len(tokens):
        raise DataError(f"{path}: holds no frame; delete it and run preprocess.py again")
    if tuple(tokens.shape[1:]) != config.latent_size or tokens.max() >= config.codebook_size:
        raise DataError(
            f"{path}: grid {list(tokens.shape[1:])} with codes up to {int(tokens.max())}, the tokenizer "
            f"{world.tokenizer.path} has {list(config.latent_size)} and {config.codebook_size} codes; "
            "use the files that go together"
        )
    actions = content["actions"]
    pose = with_first_pose(content["pose"], actions, world.degrees_per_unit)
    return Recording(path.name, tokens, torch.from_numpy(actions), torch.from_numpy(pose))


def read_clip(path: Path, world: World, frames: int | None = None) -> Recording:
    """Encodes a clip and reads the actions recorded with it, brought to the world's frame rate.

    At most `frames` frames; only the first one where no actions were recorded, since what led to the others
    is not known. Raises VideoError or ActionError.
    """
    track = read_track(path)
    if track is None:
        print(f"{path}: no actions beside it (NAME.json), so only its first frame is used")
        track = np.zeros((0, ACTION_DIM), np.float32), np.full((1, 5), np.nan, np.float32)
    recorded, pose = track
    step = max(1, round(video_fps(path) / world.fps))
    kept = kept_steps(len(recorded) + 1, 0, step)[:frames]
    pictures = [to_size(frame, world) for frame in islice(read_frames(path), 0, kept[-1] + 1, step)]
    # A video may end before its actions do.
    kept = kept[: len(pictures)]
    actions = pool_between(recorded, kept, world.degrees_per_unit)
    pose = with_first_pose(pose[kept], actions, world.degrees_per_unit)
    return Recording(
        path.name,
        world.tokenizer.encode_frames(np.stack(pictures)),
        torch.from_numpy(actions),
        torch.from_numpy(pose),
    )


def read_track(clip: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The actions recorded with a clip [N, 5], row t leads from frame t to frame t+1, and the poses of its
    frames [N+1, 5], NaN where there are none; None if there are no actions.

    They lie in NAME.json beside NAME.mp4, or in ../metadata, in GF-Minecraft's layout. Raises ActionError if
    the file or an entry cannot be read.
    """
    beside = clip.with_suffix(".json")
    places = [p for p in (beside, clip.parent.parent / "metadata" / beside.name) if p.is_file()]
    if not places:
        return None
    try:
        entries = read_gamefactory_entries(places[0])
    except ClipError as error:
        raise ActionError(f"{error.detail}; this is not a clip's metadata: repair or remove it") from None
    actions = gamefactory_actions(entries, places[0])
    numbers = range(1, len(actions) + 1)
    # Entry 0 belongs to no frame.
    pose = [np.full(5, np.nan, np.float32), *(read_pose(entries[str(k)]) for k in numbers)]
    return actions, np.stack(pose)


def to_size(picture: np.ndarray, world: World) -> np.ndarray:
    """A picture of any size [h, w, 3] at the tokenizer's size [H, W, 3]; sides are not kept in proportion."""
    height, width = world.tokenizer.config.height, world.tokenizer.config.width
    # Area averaging is right for making smaller, but shows blocks when making larger.
    larger = picture.shape[0] < height or picture.shape[1] < width
    return resize(picture, height, width, "bicubic" if larger else "area")


def decode(tokens: Tensor, world: World) -> Tensor:
    """Tokens [K, H, W] -> pictures [K, Hp, Wp, 3] uint8 on the CPU."""
    return torch.cat([to_uint8(part) for part in world.tokenizer.decode_frames(tokens, world.dtype)])
