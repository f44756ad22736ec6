"""The token files of a split in memory, and windows of consecutive frames sampled from them.

A window is a pair (clip, start): `frames` consecutive frames of one clip from frame `start` on.
"""

from collections.abc import Collection, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.actions import CLASS_NAMES, action_class
from dataset.surroundings import SCALE
from dataset.token_files import MANIFEST, DataError, Manifest, read_token_file, with_first_pose
from geometry.camera import relative_to_first


class TokenClips:
    """All clips of a split, decompressed into RAM: 1,152 bytes per frame at 32x18.

    Reading a window is then a copy of a few kB; opening the .npz for each sample would decompress the whole
    clip each time.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        tokenizer: str | None = None,
        progress: bool = False,
        extras: Collection[str] = (),
    ):
        """Loads the clips of `split` ("train", "val" or "all") in the manifest of `directory`.

        `extras` names optional arrays to load as well (token_files.EXTRAS): at 32x18 `depth` takes 2,304
        bytes per frame, `nodes` 343. Raises DataError if there are no clips, if a file is broken, if the
        tokens were made by a tokenizer whose fingerprint is not `tokenizer`, or if their depth has another
        scale.
        """
        self.directory = Path(directory)
        self.manifest = Manifest.load(directory)
        if tokenizer is not None and self.manifest.tokenizer != tokenizer:
            raise DataError(
                f"{self.directory / MANIFEST}: tokens made by tokenizer {self.manifest.tokenizer}, "
                f"the tokenizer in use is {tokenizer}; encode the clips again with it or use the other one"
            )
        if "depth" in extras and self.manifest.depth_scale not in (None, SCALE):
            raise DataError(
                f"{self.directory / MANIFEST}: depth_scale is {self.manifest.depth_scale}, expected "
                f"{SCALE}; preprocess again"
            )
        whole = {clip.name: clip.frames for clip in self.manifest.clips}
        parts = list(filter(None, (clip.part(split) for clip in self.manifest.clips)))
        self.entries = [entry for entry, _ in parts]
        if not self.entries:
            counts = {s: sum(c.split == s for c in self.manifest.clips) for s in ("train", "val")}
            raise DataError(f"{self.directory / MANIFEST}: no clip in split {split!r} (it has {counts})")
        self.tokens: list[np.ndarray] = []  # [K, H, W] uint16 each
        self.actions: list[np.ndarray] = []  # [K-1, 5] float32 each
        self.pose: list[np.ndarray] = []  # [K, 5] float32 each
        self.extras: dict[str, list[np.ndarray | None]] = {
            name: [] for name in extras
        }  # None: not in the file
        for entry, part in tqdm(parts, desc=f"load {split}", unit="clip", disable=not progress):
            codes, frames = self.manifest.codebook_size, whole[entry.name]
            content = read_token_file(self.directory / entry.file, extras, codes, frames)
            if len(content["tokens"]) != frames:
                raise DataError(
                    f"{self.directory / entry.file}: {len(content['tokens'])} frames, the manifest says "
                    f"{frames}; delete it and run preprocess.py again"
                )
            if list(content["tokens"].shape[1:]) != self.manifest.latent_size:
                raise DataError(
                    f"{self.directory / entry.file}: grid {list(content['tokens'].shape[1:])}, the manifest "
                    f"says {self.manifest.latent_size}; delete it and run preprocess.py again"
                )
            self.tokens.append(content["tokens"][part])
            self.actions.append(content["actions"][part.start : part.stop - 1])
            for name, arrays in self.extras.items():
                arrays.append(content[name][part] if name in content else None)
            scale = self.manifest.camera_degrees_per_unit
            self.pose.append(with_first_pose(content["pose"], content["actions"], scale)[part])

    @property
    def frames(self) -> int:
        """Number of frames in all clips together."""
        return sum(len(t) for t in self.tokens)

    @property
    def with_poses(self) -> bool:
        """Whether the poses of some clip are known."""
        return any(len(pose) > 1 and np.isfinite(pose).all() for pose in self.pose)

    def subset(self, indices: Sequence[int]) -> "TokenClips":
        """The clips with these indices; their arrays are shared, not copied."""
        clips = copy(self)
        for name in ("entries", "tokens", "actions", "pose"):
            setattr(clips, name, [getattr(self, name)[i] for i in indices])
        clips.extras = {name: [arrays[i] for i in indices] for name, arrays in self.extras.items()}
        return clips

    def window(self, clip: int, start: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [frames, H, W] from frame `start` of a clip on, and the actions between them [frames-1,
        5].
        """
        end = start + frames
        return self.tokens[clip][start:end], self.actions[clip][start : end - 1]

    def batch(self, windows: np.ndarray, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Windows [B, 2] of (clip, start) -> tokens, actions, poses.

        tokens [B, frames, H, W] int64; actions [B, frames-1, 5]; poses [B, frames, 5] float32 with x, y, z
        relative to whole metres near the window's first frame, NaN where unknown.
        """
        pairs = [self.window(clip, start, frames) for clip, start in windows]
        tokens = np.stack([tokens for tokens, _ in pairs]).astype(np.int64)
        actions = np.stack([actions for _, actions in pairs])
        pose = torch.from_numpy(np.stack([self.pose[c][s : s + frames] for c, s in windows]))
        return torch.from_numpy(tokens), torch.from_numpy(actions), relative_to_first(pose)


def class_shares(windows: np.ndarray, classes: list[np.ndarray], frames: int, count: int) -> np.ndarray:
    """The share of each of `count` action classes among the windows' transitions: [count].

    `classes` has, for each clip, the class of each transition.
    """
    in_windows = [classes[clip][start : start + frames - 1] for clip, start in windows]
    return np.bincount(np.concatenate(in_windows), minlength=count) / (len(in_windows) * (frames - 1))


def sample_by_class(
    windows: np.ndarray, classes: list[np.ndarray], frames: int, power: float, seed: int, epoch: int
) -> np.ndarray:
    """Samples as many windows as given, with replacement; windows with rare actions are more likely.

    A transition of a class with share s has weight s^-power, a window the sum over its transitions. power 0
    returns the windows unchanged; power 1 gives all classes equal shares if each window has a single class.
    The result depends on (seed, epoch) alone.
    """
    if power == 0 or not len(windows):
        return windows
    count = max(int(k.max(initial=0)) for k in classes) + 1
    class_weight = np.maximum(class_shares(windows, classes, frames, count), 1e-6) ** -power
    weight = np.array([class_weight[classes[clip][s : s + frames - 1]].sum() for clip, s in windows])
    rng = np.random.default_rng([seed, epoch, 1])
    return windows[rng.choice(len(windows), len(windows), p=weight / weight.sum())]


def epoch_windows(lengths: list[int], frames: int, seed: int, epoch: int) -> np.ndarray:
    """The windows of one pass over the data, shuffled: [N, 2] of (clip, start).

    Each clip is cut into windows from a random first frame on. Consecutive windows share one frame, so that
    each transition is in at most one window. The result depends on (seed, epoch) alone, so a resumed run
    uses the same windows as an uninterrupted one. Clips shorter than a window give none.
    """
    rng = np.random.default_rng([seed, epoch])
    transitions = frames - 1
    windows = []
    for clip, length in enumerate(lengths):
        spare = length - frames
        if spare >= 0:
            first = rng.integers(0, min(spare, transitions - 1) + 1)
            windows += [(clip, start) for start in range(first, spare + 1, transitions)]
    return rng.permutation(np.array(windows, dtype=np.int64).reshape(-1, 2))


class WindowBatches:
    """An endless stream of batches of training windows, pass after pass over the clips.

    Its `position` is all that a resumed run needs to continue with the same batches.
    """

    def __init__(
        self,
        clips: TokenClips,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        balance: float = 0.0,
    ):
        """`balance`: `power` of `sample_by_class`. With several `processes` the one of this `rank` takes its
        own slice of each batch, so that all together see the windows that one alone would see; `batch_size`
        is that of all together."""
        self.clips, self.batch_size, self.seed, self.balance = clips, batch_size, seed, balance
        self.classes = [action_class(actions) for actions in clips.actions]
        share = batch_size // processes
        self.own = slice(rank * share, (rank + 1) * share)
        self.lengths = [len(tokens) for tokens in clips.tokens]
        self.position = {"epoch": 0, "index": 0, "seq_len": 0}
        self._windows: np.ndarray | None = None

    def restore(self, position: dict) -> None:
        """Continues from a saved `position`. Raises TypeError, KeyError or ValueError if it is none."""
        self.position = {name: int(position[name]) for name in self.position}
        self._windows = None

    def windows_of_pass(self, seq_len: int, epoch: int) -> np.ndarray:
        """The windows [N, 2] of a pass, in their order."""
        windows = epoch_windows(self.lengths, seq_len + 1, self.seed, epoch)
        return sample_by_class(windows, self.classes, seq_len + 1, self.balance, self.seed, epoch)

    def class_shares(self, seq_len: int) -> dict[str, tuple[float, float]]:
        """Share of each action class in the data, and in the windows sampled from it."""
        data = epoch_windows(self.lengths, seq_len + 1, self.seed, 0)
        shares = (
            class_shares(windows, self.classes, seq_len + 1, len(CLASS_NAMES))
            for windows in (data, self.windows_of_pass(seq_len, 0))
        )
        return dict(zip(CLASS_NAMES, zip(*shares, strict=True), strict=True))

    def next(self, seq_len: int) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        """The next batch of windows of `seq_len` transitions, this process's slice of it.

        -> windows [B, 2], tokens [B, seq_len+1, H, W], actions [B, seq_len, 5], pose [B, seq_len+1, 5], as in
        `TokenClips.batch`. A pass ends when fewer windows than a batch are left. A new `seq_len` begins a new
        pass. Raises DataError if the clips have too few windows for one batch.
        """
        p = self.position
        if p["seq_len"] != seq_len:
            new_pass = p["seq_len"] != 0
            p.update(epoch=p["epoch"] + new_pass, index=0, seq_len=seq_len)
            self._windows = None
        if self._windows is None:
            self._windows = self.windows_of_pass(seq_len, p["epoch"])
        if p["index"] + self.batch_size > len(self._windows):
            p.update(epoch=p["epoch"] + 1, index=0)
            self._windows = self.windows_of_pass(seq_len, p["epoch"])
            if len(self._windows) < self.batch_size:
                raise DataError(
                    f"{self.clips.directory}: only {len(self._windows)} windows of {seq_len} steps for a "
                    f"batch of {self.batch_size}; lower BATCH_SIZE or SEQ_LEN, or record more"
                )
        windows = self._windows[p["index"] : p["index"] + self.batch_size]
        p["index"] += self.batch_size
        windows = windows[self.own]
        return windows, *self.clips.batch(windows, seq_len + 1)

    @property
    def completion(self) -> float:
        """Per cent of the current pass that has been used."""
        return 100 * self.position["index"] / max(1, len(self._windows) if self._windows is not None else 0)
