"""Recorded frames with their depth, for training and evaluation of the depth network.

dataset/surroundings.py describes the depth files. Clips without depth can take part by their poses, see
reprojection.py.
"""

import hashlib
import json
from dataclasses import dataclass, replace
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
from dataset.splits import assign_splits, cut_of
from dataset.surroundings import decode_inverse_ray_distance
from dataset.token_files import DataError
from depth.depth_net import STRIDE
from depth.reprojection import Views
from geometry.camera import relative_to
from runtime.arrays import ArraysError, read_arrays
from runtime.outputs import make_folder, replacing
from runtime.video import read_frames, resize, to_float, to_uint8
from vq_vae.code_space import CodeSpace
from vq_vae.tokenizer import Tokenizer

REQUIRED = ("pictures", "decoded", "pose")  # arrays of a file in the cache; "codes" and "recorded" may lack
ARRAYS = ("pictures", "decoded", "codes", "pose", "recorded")


@dataclass(frozen=True)
class DepthClip:
    """Every `step`-th frame of a clip."""

    name: str
    pictures: np.ndarray  # [K, Hp, Wp, 3] uint8
    decoded: np.ndarray  # [K] bool: the picture went through the tokenizer
    codes: np.ndarray | None  # [K, H, W] uint8, see decode_inverse_ray_distance; None: recorded without depth
    pose: np.ndarray  # [K, 5] float32, NaN where unknown
    recorded: np.ndarray | None = (
        None  # [D, Hp, Wp, 3]: the `decoded` pictures before; kept without depth only
    )

    def recorded_picture(self, row: int) -> np.ndarray:
        """The picture [Hp, Wp, 3] uint8 of a row as it was recorded, of a clip without depth."""
        if self.recorded is None or not self.decoded[row]:
            return self.pictures[row]
        return self.recorded[np.count_nonzero(self.decoded[:row])]

    def rows(self, first: int, end: int) -> "DepthClip":
        """Some rows of the clip."""
        before, inside = (int(np.count_nonzero(self.decoded[:row])) for row in (first, end))
        return DepthClip(
            self.name,
            self.pictures[first:end],
            self.decoded[first:end],
            None if self.codes is None else self.codes[first:end],
            self.pose[first:end],
            None if self.recorded is None else self.recorded[before:inside],
        )

    def as_recorded(self) -> "DepthClip":
        """The clip with no picture decoded, of a clip without depth."""
        if self.recorded is None:
            return self
        pictures = self.pictures.copy()
        pictures[self.decoded] = self.recorded
        return replace(self, pictures=pictures, decoded=np.zeros_like(self.decoded), recorded=None)


def find_depth_clips(folders: str, need_depth: bool = True) -> list[Clip]:
    """All clips in folders given as "FOLDER,FOLDER,..."; only those with depth if `need_depth`.

    Raises DataError if there is none.
    """
    found = []
    for folder in filter(None, folders.split(",")):
        if not Path(folder).is_dir():
            raise DataError(
                f"{folder}: no such folder of clips; give another one (DATA_DIRS, --warp), or record "
                "clips with depth: make data (about an hour)"
            )
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
            if need_depth
            else f"{folders}: no clip in it; expected metadata/NAME.json and video/NAME.mp4"
        )
    return found


def split_clips(clips: list[Clip], val_fraction: float) -> dict[str, list[Clip]]:
    """Clips by split, "train" and "val", by the same rule as preprocess.py's: whole worlds where there are
    enough. A single clip is for training, see `split_only_clip`."""
    assigned, _ = assign_splits({str(clip.video): split_key(clip.video) for clip in clips}, val_fraction)
    splits: dict[str, list[Clip]] = {"train": [], "val": []}
    for clip in clips:
        splits[assigned[str(clip.video)]].append(clip)
    return splits


def split_only_clip(clip: "DepthClip", step: int, val_fraction: float) -> dict[str, list["DepthClip"]]:
    """The only clip, every `step`-th frame of it, with its end held out, see `splits.cut_of`."""
    cut = [-(-frame // step) for frame in cut_of(step * len(clip.pictures), val_fraction)]
    if not cut or not 0 < cut[0] <= cut[1] < len(clip.pictures):
        return {"train": [clip], "val": []}
    return {"train": [clip.rows(0, cut[0])], "val": [clip.rows(cut[1], len(clip.pictures))]}


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
    recipe = [step, *picture, tokenizer.checksum if tokenizer and share else "", share, noise]
    loaded = []
    for clip in tqdm(clips, desc="clips", unit="clip"):
        files = (clip.video, clip.metadata, depth_path(clip.video))
        stamps = [
            [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
            if file.is_file() or file != files[2]  # there need not be depth
        ]
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
        np.savez(file, **{name: array for name in ARRAYS if (array := getattr(clip, name)) is not None})


def _read(path: Path, name: str) -> DepthClip:
    """A clip from the cache. Raises DataError if the file is broken."""
    try:
        arrays = read_arrays(path, REQUIRED, set(ARRAYS) - set(REQUIRED), most_bytes=2**34)
    except (OSError, ArraysError) as error:
        raise DataError(f"{error}; delete it, it is made again") from None
    return DepthClip(name, *(arrays.get(part) for part in ARRAYS))


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
    recorded = clip.pictures[chosen] if clip.codes is None else None
    return DepthClip(clip.name, pictures, chosen, clip.codes, clip.pose, recorded)


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class DepthBatch:
    """Frames for the network."""

    pictures: Tensor  # [B, 3, Hp, Wp] float32 in [0, 1]
    target: Tensor  # [B, H, W] log inverse ray distance, log(1/m); NaN where not `labelled`
    pitch: Tensor  # [B] degrees, NaN where unknown
    labelled: Tensor  # [B] bool: recorded with depth
    views: Views | None = None  # of the N samples without depth, in their order; None if there is none

    def flip(self, where: Tensor) -> "DepthBatch":
        """Mirrors the frames `where` [B] bool left-right; the pitch stays."""
        return replace(
            self,
            pictures=torch.where(where[:, None, None, None], self.pictures.flip(3), self.pictures),
            target=torch.where(where[:, None, None], self.target.flip(2), self.target),
            views=self.views.flip(where[~self.labelled]) if self.views else None,
        )

    def to(self, device: torch.device) -> "DepthBatch":
        """On a device."""
        return DepthBatch(
            self.pictures.to(device),
            self.target.to(device),
            self.pitch.to(device),
            self.labelled.to(device),
            self.views.to(device) if self.views else None,
        )


class DepthFrames:
    """All frames of some clips, by their number. `farthest_m` is the ray distance of the sky.

    A frame without depth is given with those `apart` rows of its clip before and after it.
    """

    def __init__(self, clips: list[DepthClip], farthest_m: float, apart: int = 1):
        self.clips, self.apart = clips, apart
        self.ends = np.cumsum([len(clip.pictures) for clip in clips])
        inverse = decode_inverse_ray_distance(np.arange(256))
        self.log_inverse = torch.from_numpy(np.log(np.maximum(inverse, 1 / farthest_m)))  # of each code

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        arrays = (array for clip in self.clips for array in (clip.pictures, clip.codes, clip.recorded))
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def decoded(self) -> np.ndarray:
        """[N] bool: which frames went through the tokenizer."""
        return np.concatenate([clip.decoded for clip in self.clips])

    @property
    def labelled(self) -> np.ndarray:
        """[N] bool: which frames were recorded with depth."""
        return np.concatenate([np.full(len(clip.pictures), clip.codes is not None) for clip in self.clips])

    def batch(self, numbers: np.ndarray) -> DepthBatch:
        """The frames `numbers` [B]."""
        which = np.searchsorted(self.ends, numbers, side="right")
        rows = [(self.clips[c], n - self.ends[c]) for c, n in zip(which, numbers, strict=True)]
        rows = [(clip, int(row) + len(clip.pictures)) for clip, row in rows]
        pictures = torch.from_numpy(np.stack([clip.pictures[row] for clip, row in rows]))
        unknown = torch.full([side // STRIDE for side in pictures.shape[1:3]], torch.nan)
        target = [
            unknown if clip.codes is None else self.log_inverse[clip.codes[row].astype(np.int64)]
            for clip, row in rows
        ]
        pitch = torch.tensor([float(clip.pose[row, 4]) for clip, row in rows])
        bare = [(clip, row) for clip, row in rows if clip.codes is None]
        return DepthBatch(
            to_float(pictures),
            torch.stack(target),
            pitch,
            torch.tensor([clip.codes is not None for clip, _ in rows]),
            self._views(bare) if bare else None,
        )

    def _views(self, rows: list[tuple[DepthClip, int]]) -> Views:
        """Recorded pictures and poses of frames and of those `apart` rows before and after."""
        pictures, poses = [], []
        for clip, row in rows:
            wanted = (row, row - self.apart, row + self.apart)
            there = [0 <= other < len(clip.pictures) for other in wanted]
            near = [other if exists else row for other, exists in zip(wanted, there, strict=True)]
            pictures.append(np.stack([clip.recorded_picture(other) for other in near]))
            poses.append(np.where(np.array(there)[:, None], clip.pose[near], np.nan))
        shown = to_float(torch.from_numpy(np.stack(pictures)).flatten(0, 1)).unflatten(0, (len(rows), 3))
        pose = torch.from_numpy(np.stack(poses)).float()
        pose = relative_to(
            pose, pose[:, :1]
        )  # NaN where the frame's own pose is unknown: nothing is compared
        return Views(shown[:, 0], pose[:, 0].nan_to_num(0.0), shown[:, 1:], pose[:, 1:])


def augment(
    batch: DepthBatch, rng: np.random.Generator, flip: bool, brightness: float, unknown_pitch: float
) -> DepthBatch:
    """Random changes of a training batch.

    With `flip` half of the frames are mirrored left-right; each picture is made up to a share `brightness`
    brighter or darker; the pitch is hidden (NaN) in a share `unknown_pitch` of the frames. `views` are
    mirrored, too, but neither brighter nor darker.
    """
    size = len(batch.pitch)
    mirrored, gain, hidden = rng.random(size) < 0.5, rng.uniform(-1, 1, size), rng.random(size)
    if flip:
        batch = batch.flip(torch.from_numpy(mirrored))
    gain = torch.from_numpy(1 + brightness * gain).float()[:, None, None, None]
    pitch = batch.pitch.masked_fill(torch.from_numpy(hidden < unknown_pitch), torch.nan)
    return replace(batch, pictures=(batch.pictures * gain).clamp(0, 1), pitch=pitch)
