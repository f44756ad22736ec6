#!/usr/bin/env python3
"""Collects pictures for the training of the tokenizer from recorded clips, in one .npz file.

    python vq_vae/preprocess_vqvae.py CLIPS OUT.npz

Takes every GAP-th frame of each video in the folder CLIPS, at any depth. Whole worlds, or clips, or the end
of a single clip are held out for validation by the same rule as in preprocess.py.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.recordings import depth_path, split_key
from dataset.splits import HeldOut, assign_splits, cut_of, explain
from runtime.config import ScriptParser, positive_int, share
from runtime.errors import run_script
from runtime.outputs import check_outputs, replacing
from runtime.ranges import PictureSide, flag
from runtime.video import RESIZE, VideoError, read_frames, resize

EXAMPLE = "python vq_vae/preprocess_vqvae.py samples runs/pictures.npz  (seconds)"

VIDEO_ENDINGS = (".mp4", ".webm", ".avi", ".mkv")


@dataclass(frozen=True)
class Options:
    """The command line."""

    clips: Path
    out: Path
    gap: int
    height: int
    width: int
    resize: str
    val_fraction: float


def sample_frames(path: Path, options: Options) -> np.ndarray:
    """Every `gap`-th frame of a video, resized -> [N, height, width, 3] uint8. Raises VideoError."""
    frames = (frame for i, frame in enumerate(read_frames(path)) if i % options.gap == 0)
    return np.stack([resize(frame, options.height, options.width, options.resize) for frame in frames])


def split_pictures(found: dict[Path, np.ndarray], options: Options) -> tuple[dict[str, np.ndarray], str]:
    """The pictures of each video [N, H, W, 3] as arrays `train` and `val`, and what is held out, in words."""
    groups = {str(video): split_key(video) for video in found}
    splits, held_out = assign_splits(groups, options.val_fraction)
    pictures: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for video, frames in found.items():
        pictures[splits[str(video)]].append(frames)
    if len(found) == 1 and pictures["train"]:
        (frames,) = pictures["train"]
        cut = [-(-frame // options.gap) for frame in cut_of(options.gap * len(frames), options.val_fraction)]
        if cut and cut[0] and cut[1] < len(frames):
            pictures = {"train": [frames[: cut[0]]], "val": [frames[cut[1] :]]}
            held_out = HeldOut.END
    empty = np.zeros((0, options.height, options.width, 3), np.uint8)
    arrays = {split: np.concatenate(parts) if parts else empty for split, parts in pictures.items()}
    return arrays, explain(held_out, Counter(splits.values()), options.val_fraction)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file, complete or not at all. Raises OutputError."""
    with replacing(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)


def run(options: Options) -> None:
    """Writes the pictures and prints a summary; a video that cannot be read is skipped. Raises VideoError."""
    videos = sorted(p for p in options.clips.rglob("*") if p.suffix in VIDEO_ENDINGS)
    if not videos:
        raise VideoError(f"{options.clips}: holds no video ({', '.join(VIDEO_ENDINGS)})")
    check_outputs([options.out], [path for video in videos for path in (video, depth_path(video))])
    found: dict[Path, np.ndarray] = {}
    skipped = []
    for video in tqdm(videos, unit="clip"):
        try:
            found[video] = sample_frames(video, options)
        except VideoError as error:
            skipped.append(str(error))
    for reason in skipped:
        print(f"skipped: {reason}")
    if len(skipped) == len(videos):
        raise VideoError(
            f"{options.clips}: none of the {len(videos)} videos can be read; {options.out} is not written; "
            "record the clips again"
        )
    arrays, what = split_pictures(found, options)
    write_arrays(options.out, arrays)
    print(
        f"{options.out}: {len(arrays['train'])} train and {len(arrays['val'])} val pictures "
        f"from {len(videos) - len(skipped)} clips, {len(skipped)} skipped\n{what}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = ScriptParser(description=__doc__, example=EXAMPLE)
    parser.add_argument("clips", type=Path, help="folder with the videos, at any depth")
    parser.add_argument("out", type=Path, help=".npz to write")
    parser.add_argument("--gap", type=positive_int, default=5, help="take every GAP-th frame (default 5)")
    parser.add_argument("--height", type=flag(PictureSide), default=72, help="of the pictures (default 72)")
    parser.add_argument("--width", type=flag(PictureSide), default=128, help="of the pictures (default 128)")
    parser.add_argument("--resize", choices=sorted(RESIZE), default="area")
    parser.add_argument("--val_fraction", type=share, default=0.1, help="of clips or worlds (default 0.1)")
    options = Options(**vars(parser.parse_args(arguments)))
    return run_script(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
