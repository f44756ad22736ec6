"""What worlds are judged on: held-out clips, windows of them, true pictures; and the world that is judged."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset.actions import PITCH, YAW
from dataset.token_files import DataError, unpack_indices
from dataset.windows import TokenClips
from rollout.rollout import Rollout
from rollout.sampling import SamplingConfig
from rollout.world_model import WorldModel
from runtime.video import VideoError, read_frames, resize, to_float
from vq_vae.tokenizer import Tokenizer

BATCH = 16  # windows that go through the model together
PICTURES = 64  # pictures that are encoded or decoded together


@dataclass(frozen=True)
class Plan:
    """How much is measured. The numbers of a full run; `QUICK` is a smoke test of the same."""

    contexts: tuple[int, ...] = (1, 6, 16)  # frames seen before a rollout starts
    horizons: tuple[int, ...] = (1, 4, 8, 16, 20, 32, 64)  # frames into the rollout that are reported
    windows: int = 64  # recorded stretches that are generated again
    teacher_forced: int = 12_000  # frames at most, spread over the clips
    starts: int = 64  # places where each of the constant commands is given
    still: int = 64  # recorded stretches without an action
    memory: int = 48  # places where the camera turns away and back
    recorded: int = 16  # look-aways of real play, for each angle
    streams: int = 16  # long rollouts ...
    life: int = 1024  # ... of so many frames

    @property
    def span(self) -> int:
        """Frames of a window: the longest context and the farthest horizon."""
        return max(self.contexts) + max(self.horizons)

    @property
    def main(self) -> int:
        """The context of all that is measured with one context only: 6 frames where that is among them."""
        return 6 if 6 in self.contexts else max(self.contexts)


QUICK = Plan(windows=4, teacher_forced=320, starts=2, still=4, memory=2, recorded=1, streams=2, life=192)


def spread_windows(lengths: list[int], span: int, count: int, seed: int) -> np.ndarray:
    """`count` windows of `span` frames, even over the clips and along each: [N, 2] of (clip, start).

    Each clip is cut into as many stretches as it gives windows; each window starts somewhere in its stretch.
    Clips shorter than a window give none; raises DataError if that leaves none at all.
    """
    usable = [clip for clip, frames in enumerate(lengths) if frames >= span]
    if not usable:
        raise DataError(f"no clip has the {span} frames of a window (the longest has {max(lengths)})")
    rng = np.random.default_rng(seed)
    # With fewer windows than clips, the clips that give one are spread over the list.
    shares = np.diff(np.linspace(0, count, len(usable) + 1).round().astype(int))
    windows = []
    for clip, share in zip(usable, shares, strict=True):
        starts = (np.arange(share) + rng.random(share)) / max(share, 1) * (lengths[clip] - span + 1)
        windows += [(clip, int(start)) for start in starts]
    return np.array(windows)


def thin(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)] if len(rows) else rows


class HeldOutClips:
    """The clips of a split with the tokenizer that made them."""

    def __init__(
        self, clips: TokenClips, tokenizer: Tokenizer, seed: int, dtype: torch.dtype = torch.float32
    ):
        self.clips, self.tokenizer, self.seed, self.dtype = clips, tokenizer, seed, dtype
        self.device = tokenizer.device
        self.manifest = clips.manifest
        self.fov = clips.manifest.vertical_fov_degrees
        self.degrees_per_unit = clips.manifest.camera_degrees_per_unit

    @cached_property
    def lengths(self) -> list[int]:
        """Frames of each clip."""
        return [len(tokens) for tokens in self.clips.tokens]

    def windows(self, span: int, count: int) -> np.ndarray:
        """`spread_windows` over these clips."""
        return spread_windows(self.lengths, span, count, self.seed)

    def batch(self, windows: np.ndarray, span: int) -> tuple[Tensor, Tensor]:
        """Windows [N, 2] -> tokens [N, span, H, W] int64 and the actions between them [N, span-1, 5]."""
        return self.clips.batch(windows, span)[:2]

    def pose(self, windows: np.ndarray, span: int) -> Tensor:
        """[N, span, 5] x, y, z (metres, from the window's first frame), yaw, pitch (degrees) of each frame; NaN
        where unknown."""
        return self.clips.batch(windows, span)[2]

    def turned(self, windows: np.ndarray, span: int) -> Tensor:
        """[N, span, 2] yaw and pitch in degrees of each frame: recorded, else summed up from the actions.

        Where no pose was recorded the pitch at the window's start is taken to be level.
        """
        pose = self.pose(windows, span)[..., 3:]
        actions = self.batch(windows, span)[1][..., [YAW, PITCH]] * self.degrees_per_unit
        summed = torch.cat([torch.zeros_like(pose[:, :1]), actions.cumsum(1)], 1)
        return torch.where(pose.isfinite(), pose, summed)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [..., H, W] -> pictures [..., 3, Hp, Wp] float32 in [0, 1] on the CPU."""
        flat = tokens.reshape(-1, *tokens.shape[-2:])
        made = torch.cat(list(self.tokenizer.decode_frames(flat, self.dtype)))
        return made.reshape(*tokens.shape[:-2], *made.shape[1:])

    @torch.inference_mode()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [..., 3, Hp, Wp] in [0, 1] -> tokens [..., H, W] int64 on the CPU."""
        flat = pictures.reshape(-1, *pictures.shape[-3:])
        made = self.tokenizer.encode_frames(flat)
        return made.reshape(*pictures.shape[:-3], *made.shape[1:])

    def true_pictures(self, windows: np.ndarray, frames: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """For each window whose video can be opened: its number, and its pictures at `frames` [F] (offsets
        from the window's start), [F, 3, Hp, Wp] in [0, 1]. Each video is decoded once, in order."""
        size, method = self.manifest.picture_size, self.manifest.resize
        for clip in tqdm(np.unique(windows[:, 0]), desc="true pictures", unit="clip", leave=False):
            entry = self.clips.entries[clip]
            video_frame = np.array(
                unpack_indices(entry.kept, entry.frames)
            )  # of each frame of the token file
            numbers = np.flatnonzero(windows[:, 0] == clip)
            wanted = {n: video_frame[windows[n, 1] + frames] for n in numbers}
            needed = sorted({int(i) for places in wanted.values() for i in places})
            try:
                video = read_frames(self.clips.directory / entry.video, wanted=needed)
                found = {i: resize(frame, *size, method) for i, frame in zip(needed, video, strict=True)}
            except VideoError as error:
                tqdm.write(f"no true pictures of {entry.name}: {error}")
                continue
            for n, places in wanted.items():
                yield n, to_float(torch.from_numpy(np.stack([found[int(i)] for i in places])))


@dataclass
class Subject:
    """A world that is judged, and how its tokens are chosen."""

    name: str  # unique among those judged together
    path: Path
    model: WorldModel
    content: dict  # of the checkpoint
    sampling: SamplingConfig
    seed: int
    dtype: torch.dtype
    kept: dict[int, tuple] = field(default_factory=dict)  # first of a batch -> (what it was shown, rollout)

    def rollout(self, seen: Tensor, actions: Tensor, pose: Tensor, what: str) -> Tensor:
        """Rollouts on: seen [N, C, H, W], actions [N, C-1+K, 5] (those between the seen frames come first),
        pose [N, C, 5] of the seen frames, NaN where unknown -> the K frames that follow, [N, K, H, W] int64
        on the CPU. `what` names it in the progress bar."""
        context, made = seen.shape[1], []
        steps = actions.shape[1] - context + 1
        with tqdm(total=len(seen) * steps, desc=f"{self.name}: {what}", unit="frame", leave=False) as bar:
            for first in range(0, len(seen), BATCH):
                now = slice(first, first + BATCH)
                rollout = self.primed(first, seen[now], actions[now, : context - 1], pose[now])
                frames = []
                for t in range(context - 1, actions.shape[1]):
                    frames.append(rollout.step(actions[now, t]).cpu())
                    bar.update(len(frames[-1]))
                made.append(torch.stack(frames, 1))
        return torch.cat(made)

    def primed(self, first: int, *shown: Tensor) -> Rollout:
        """A rollout of the batch that begins at `first`, primed on what it is `shown` (see `Rollout.prime`). The
        last one of each batch is kept: sections rollout on from the same frames under one command after
        another."""
        kept, rollout = self.kept.get(first, ((), None))
        if len(kept) != len(shown) or not all(map(same, kept, shown)):
            rollout = Rollout(self.model, self.sampling, self.seed + first, self.dtype)
            rollout.prime(*shown)
            self.kept[first] = shown, rollout
        return rollout.copy()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, unknown (NaN) numbers too."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


@dataclass
class Judges:
    """The networks that compare pictures."""

    perceptual: dict[str, nn.Module]  # name of the metric -> distance
    embed: nn.Module  # pictures -> features of the Fréchet distance
    inverse_dynamics: nn.Module | None

    @torch.inference_mode()
    def distances(self, made: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Each perceptual distance of two batches of pictures [N, 3, Hp, Wp]: [N] on the CPU."""
        found = {}
        for name, distance in self.perceptual.items():
            device = next(distance.parameters()).device
            found[name] = distance(made.to(device), truth.to(device)).cpu()
        return found
