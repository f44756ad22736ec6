#!/usr/bin/env python3
"""Samples pictures for the tokenizer from recorded clips: frames at least GAP apart, shrunk, in one .npz.

    python vq_vae/preprocess_vqvae.py CLIPS OUT.npz

CLIPS is searched for videos; whole clips, or whole worlds where their metadata
names them, are held out for validation by the same rule as preprocess.py's.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.recordings import split_key
from dataset.token_files import split_of
from runtime.video import RESIZE, VideoError, read_frames, resize

VIDEO_ENDINGS = (".mp4", ".webm", ".avi", ".mkv")


def sample_frames(path: Path, gap: int, height: int, width: int, method: str) -> np.ndarray:
    """Every `gap`-th frame of a video -> [N, height, width, 3] uint8."""
    return np.stack(
        [resize(f, height, width, method) for i, f in enumerate(read_frames(path)) if i % gap == 0]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clips", type=Path, help="folder that holds the videos, at any depth")
    parser.add_argument("out", type=Path, help=".npz to write")
    parser.add_argument("--gap", type=int, default=5, help="take every GAP-th frame (default 5)")
    parser.add_argument("--height", type=int, default=72)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--resize", choices=sorted(RESIZE), default="area")
    parser.add_argument("--val_fraction", type=float, default=0.1)
    args = parser.parse_args()

    videos = sorted(p for p in args.clips.rglob("*") if p.suffix in VIDEO_ENDINGS)
    if not videos:
        parser.error(f"{args.clips}: holds no video ({', '.join(VIDEO_ENDINGS)})")
    pictures: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    skipped = []
    for video in tqdm(videos, unit="clip"):
        try:
            found = sample_frames(video, args.gap, args.height, args.width, args.resize)
        except VideoError as error:
            skipped.append(str(error))
            continue
        pictures[split_of(split_key(video), args.val_fraction)].append(found)
    empty = np.zeros((0, args.height, args.width, 3), np.uint8)
    arrays = {split: np.concatenate(found) if found else empty for split, found in pictures.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(args.out.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, args.out)
    for reason in skipped:
        print(f"skipped: {reason}")
    print(
        f"{args.out}: {len(arrays['train'])} train and {len(arrays['val'])} val pictures "
        f"from {len(videos) - len(skipped)} clips, {len(skipped)} skipped"
    )


if __name__ == "__main__":
    main()
