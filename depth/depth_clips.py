"""Recorded frames with their depth, for training and evaluation of the depth network.

dataset/surroundings.py describes the depth files.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.recordings import (
    Clip,
    depth_path,
    find_clips,
    gamefactory_track,
    read_depth_file,
    read_gamefactory_entries,
    split_key,
)
from dataset.surroundings import decode_inverse_ray_distance
from dataset.token_files import DataError, split_of
from runtime.outputs import make_folder, replacing
from runtime.video import read_frames, resize, to_float, to_uint8
from vq_vae.code_space import CodeSpace
from vq_vae.tokenizer import Tokenizer


@dataclass(frozen=True)
class DepthClip:
    """Every `step`-th frame of a clip."""

    name: str
    pictures: np.ndarray  # [K, Hp, Wp, 3] uint8
    decoded: np.ndarray  # [K] bool: the picture went through the tokenizer
    codes: np.ndarray | None  # [K, H, W] uint8, see decode_inverse_ray_distance; None: recorded without depth
    pose: np.ndarray  # [K, 5] float32, NaN where unknown


def find_depth_clips(folders: str, need_depth: bool = True) -> list[Clip]:
    """All clips in folders given as "FOLDER,FOLDER,..."; only those with depth if `need_depth`.

    Raises DataError if there is none.
    """
    found = []
    for folder in filter(None, folders.split(",")):
        _, clips = find_clips(Path(folder), "gamefactory", Path(folder) / "depth")
        found += [
            clip
            for clip in clips
            if clip.metadata.is_file() and (not need_depth or depth_path(clip.video).is_file())
        ]
    if not found:
        raise DataError(
            f"{folders}: no clip with depth in it; expected depth/NAME.npz beside metadata/NAME.json and "
            "video/NAME.mp4, from record.py"
        )
    return found


def split_clips(clips: list[Clip], val_fraction: float) -> dict[str, list[Clip]]:
    """Clips by split, "train" and "val". Whole worlds are held out, by the same rule as preprocess.py's."""
    splits: dict[str, list[Clip]] = {"train": [], "val": []}
    for clip in clips:
        splits[split_of(split_key(clip.video), val_fraction)].append(clip)
    return splits


def read_clip(clip: Clip, step: int, picture: tuple[int, int]) -> DepthClip:
    """Every `step`-th frame of a clip, resized to `picture` (height, width).

    Raises ClipError, VideoError or DataError if a file is missing, broken, or of another length.
    """
    entries = read_gamefactory_entries(clip.metadata)
    _, pose = gamefactory_track(entries, clip.metadata)
    recorded = read_depth_file(clip.video, len(pose))
    codes = None if recorded is None else recorded.log_inverse[::step]
    kept = range(0, len(pose), step)
    frames = read_frames(clip.video, list(kept), len(pose))
    pictures = np.stack([resize(frame, *picture) for frame in frames])
    return DepthClip(clip.name, pictures, np.zeros(len(kept), bool), codes, pose[::step])


def load_clips(
    clips: list[Clip],
    step: int,
    picture: tuple[int, int],
    cache: Path,
    tokenizer: Tokenizer | None = None,
    share: float = 0.0,
    noise: float = 0.0,
) -> list[DepthClip]:
    """Clips in memory: every `step`-th frame, resized to `picture` (height, width).

    A `share` of the frames is replaced by what `tokenizer` decodes of it, see `pass_through`. Each clip is
    prepared once and kept in the folder `cache`, which may be deleted. Raises as `read_clip`.
    """
    make_folder(cache)
    recipe = [step, *picture, tokenizer.fingerprint if tokenizer and share else "", share, noise]
    loaded = []
    for clip in tqdm(clips, desc="clips", unit="clip"):
        files = (clip.video, clip.metadata, depth_path(clip.video))
        stamps = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        key = hashlib.sha256(json.dumps([recipe, stamps]).encode()).hexdigest()[:16]
        path = cache / f"{clip.key}_{key}.npz"
        if not path.is_file():
            made = read_clip(clip, step, picture)
            if tokenizer is not None and share:
                made = pass_through(made, tokenizer, share, noise, seed=int(key, 16))
            _write(path, made)
        loaded.append(_read(path, clip.name))
    return loaded


def _write(path: Path, clip: DepthClip) -> None:
    """Writes a clip to the cache atomically, not compressed."""
    with replacing(path) as part, open(part, "wb") as file:
        np.savez(file, pictures=clip.pictures, decoded=clip.decoded, codes=clip.codes, pose=clip.pose)


def _read(path: Path, name: str) -> DepthClip:
    """A clip from the cache. Raises DataError if the file is broken."""
    try:
        with np.load(path) as arrays:
            return DepthClip(name, *(arrays[part] for part in ("pictures", "decoded", "codes", "pose")))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it, it is made again") from None


@torch.inference_mode()
def pass_through(clip: DepthClip, tokenizer: Tokenizer, share: float, noise: float, seed: int) -> DepthClip:
    """The clip with an evenly spread `share` of its pictures encoded and decoded by the tokenizer.

    Every second of them is decoded from tokens of which a share, from 0..`noise`, is replaced by similar
    codes, as a world model's errors do.
    """
    numbers = np.arange(len(clip.pictures))
    chosen = np.floor((numbers + 1) * share) > np.floor(numbers * share)
    tokens = tokenizer.encode_frames(clip.pictures[chosen])  # [N, H, W]
    space = CodeSpace(len(tokenizer.codebook), tokenizer.codebook.shape[1], 24)
    space.fit(tokenizer.codebook.cpu())
    similar = space.similar_codes(8)  # [V, 8]
    draw = torch.Generator().manual_seed(seed % 2**63)
    replaced = torch.rand(tokens.shape, generator=draw)
    limit = noise * torch.rand(len(tokens), 1, 1, generator=draw)
    limit[::2] = 0.0
    other = torch.randint(similar.shape[1], tokens.shape, generator=draw)
    tokens = torch.where(replaced < limit, similar[tokens, other], tokens)
    pictures = clip.pictures.copy()
    if len(tokens):
        pictures[chosen] = np.concatenate([to_uint8(part) for part in tokenizer.decode_frames(tokens)])
    return DepthClip(clip.name, pictures, chosen, clip.codes, clip.pose)


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class DepthBatch:
    """Frames for the network."""

    pictures: Tensor  # [B, 3, Hp, Wp] float32 in [0, 1]
    target: Tensor  # [B, H, W] log inverse ray distance, log(1/m)
    pitch: Tensor  # [B] degrees, NaN where unknown

    def flip(self, where: Tensor) -> "DepthBatch":
        """Mirrors the frames `where` [B] bool left-right; the pitch stays."""
        return DepthBatch(
            torch.where(where[:, None, None, None], self.pictures.flip(3), self.pictures),
            torch.where(where[:, None, None], self.target.flip(2), self.target),
            self.pitch,
        )

    def to(self, device: torch.device) -> "DepthBatch":
        """On a device."""
        return DepthBatch(self.pictures.to(device), self.target.to(device), self.pitch.to(device))


class DepthFrames:
    """All frames of some clips, by their number. `farthest_m` is the ray distance of the sky."""

    def __init__(self, clips: list[DepthClip], farthest_m: float):
        self.clips = clips
        self.ends = np.cumsum([len(clip.pictures) for clip in clips])
        inverse = decode_inverse_ray_distance(np.arange(256))
        self.log_inverse = torch.from_numpy(np.log(np.maximum(inverse, 1 / farthest_m)))  # of each code

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(clip.pictures.nbytes + clip.codes.nbytes for clip in self.clips)

    @property
    def decoded(self) -> np.ndarray:
        """[N] bool: which frames went through the tokenizer."""
        return np.concatenate([clip.decoded for clip in self.clips])

    def batch(self, numbers: np.ndarray) -> DepthBatch:
        """The frames `numbers` [B]."""
        which = np.searchsorted(self.ends, numbers, side="right")
        rows = [(self.clips[c], n - self.ends[c]) for c, n in zip(which, numbers, strict=True)]
        pictures = torch.from_numpy(np.stack([clip.pictures[row] for clip, row in rows]))
        codes = torch.from_numpy(np.stack([clip.codes[row] for clip, row in rows]))
        pitch = torch.tensor([float(clip.pose[row, 4]) for clip, row in rows])
        return DepthBatch(to_float(pictures), self.log_inverse[codes.long()], pitch)


def augment(
    batch: DepthBatch, rng: np.random.Generator, flip: bool, brightness: float, unknown_pitch: float
) -> DepthBatch:
    """Random changes of a training batch.

    With `flip` half of the frames are mirrored left-right; each picture is made up to a share `brightness`
    brighter or darker; the pitch is hidden (NaN) in a share `unknown_pitch` of the frames.
    """
    size = len(batch.pitch)
    mirrored, gain, hidden = rng.random(size) < 0.5, rng.uniform(-1, 1, size), rng.random(size)
    if flip:
        batch = batch.flip(torch.from_numpy(mirrored))
    gain = torch.from_numpy(1 + brightness * gain).float()[:, None, None, None]
    pitch = batch.pitch.masked_fill(torch.from_numpy(hidden < unknown_pitch), torch.nan)
    return DepthBatch((batch.pictures * gain).clamp(0, 1), batch.target, pitch)
