"""Held-out clips: windows of them, their original pictures, and the tokenizer that made their tokens."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.actions import PITCH, YAW
from dataset.token_files import RECORDED, DataError, unpack_indices
from dataset.windows import TokenClips
from runtime.video import VideoError, read_frames, resize, to_float
from vq_vae.tokenizer import Tokenizer


def spread_windows(lengths: list[int], span: int, count: int, seed: int) -> np.ndarray:
    """`count` windows of `span` frames, evenly over the clips and along each: [N, 2] of (clip, start).

    `lengths` are the clips' frames. A clip with n windows is cut into n equal stretches, and a window starts
    at a random frame of each. Clips shorter than a window have none; raises DataError if all are.
    """
    usable = [clip for clip, frames in enumerate(lengths) if frames >= span]
    if not usable:
        raise DataError(
            f"no clip has the {span} frames of a window (the longest has {max(lengths)}); "
            "give longer clips with --data_dir"
        )
    rng = np.random.default_rng(seed)
    # With fewer windows than clips, the clips that have one are spread over the list.
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
    """The clips of a split with their tokenizer."""

    def __init__(
        self, clips: TokenClips, tokenizer: Tokenizer, seed: int, dtype: torch.dtype = torch.float32
    ):
        """`seed` samples the windows; `dtype` is that of the decoder's autocast."""
        self.clips, self.tokenizer, self.seed, self.dtype = clips, tokenizer, seed, dtype
        self.manifest = clips.manifest
        self.fov = clips.manifest.vertical_fov_degrees
        self.degrees_per_unit = clips.manifest.camera_degrees_per_unit
        self.lengths = [len(tokens) for tokens in clips.tokens]  # frames of each clip

    def windows(self, span: int, count: int) -> np.ndarray:
        """`spread_windows` over these clips."""
        return spread_windows(self.lengths, span, count, self.seed)

    def view_angles(self, windows: np.ndarray, span: int) -> Tensor:
        """Yaw and pitch in degrees of each frame [N, span, 2]: recorded, else summed up from the actions.

        Without recorded poses the pitch at the window's start counts as level.
        """
        _, actions, pose = self.clips.batch(windows, span)
        recorded, turns = pose[..., 3:], actions[..., [YAW, PITCH]] * self.degrees_per_unit
        summed = torch.cat([torch.zeros_like(recorded[:, :1]), turns.cumsum(1)], 1)
        return torch.where(recorded.isfinite(), recorded, summed)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [..., H, W] -> pictures [..., 3, Hp, Wp] float32 in [0, 1] on the CPU."""
        flat = tokens.reshape(-1, *tokens.shape[-2:])
        pictures = torch.cat(list(self.tokenizer.decode_frames(flat, self.dtype)))
        return pictures.reshape(*tokens.shape[:-2], *pictures.shape[1:])

    @torch.inference_mode()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [..., 3, Hp, Wp] in [0, 1] -> tokens [..., H, W] int64 on the CPU."""
        tokens = self.tokenizer.encode_frames(pictures.reshape(-1, *pictures.shape[-3:]))
        return tokens.reshape(*pictures.shape[:-3], *tokens.shape[1:])

    def original_pictures(self, windows: np.ndarray, frames: np.ndarray) -> dict[int, Tensor]:
        """Original pictures of the windows whose video can be opened: window index -> [F, 3, Hp, Wp].

        In [0, 1]. `frames` [F] are offsets from a window's start. Each video is decoded once, in order.
        """
        return dict(self._read_pictures(windows, frames))

    def _read_pictures(self, windows: np.ndarray, frames: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """The items of `original_pictures`."""
        size, method = self.manifest.picture_size, self.manifest.resize
        for clip in tqdm(np.unique(windows[:, 0]), desc="original pictures", unit="clip", leave=False):
            entry = self.clips.entries[clip]
            video_frames = np.array(unpack_indices(entry.kept, entry.frames))  # of each frame of tokens
            indices = np.flatnonzero(windows[:, 0] == clip)
            wanted = {n: video_frames[windows[n, 1] + frames] for n in indices}
            needed = sorted({int(i) for numbers in wanted.values() for i in numbers})
            try:
                video = read_frames(self.clips.directory / entry.video, wanted=needed)
                found = {i: resize(frame, *size, method) for i, frame in zip(needed, video, strict=True)}
            except VideoError as error:
                tqdm.write(f"no original pictures of {entry.name}: {error}")
                continue
            for n, numbers in wanted.items():
                yield n, to_float(torch.from_numpy(np.stack([found[int(i)] for i in numbers])))


def has_recorded_depth(held_out: HeldOutClips, clip: int) -> bool:
    """Whether a clip's recorded depth is loaded."""
    loaded = held_out.clips.extras.get("depth")
    return bool(loaded) and loaded[clip] is not None and held_out.clips.entries[clip].depth == RECORDED
