#!/usr/bin/env python3
"""Packs clips for another machine: the same layout, the pictures shrunk to the world's own size.

    python tools/pack.py data/luanti outputs/luanti-128x72
    tar czf luanti.tar.gz -C outputs luanti-128x72

Everything that reads clips reads packed ones. Depth files (surroundings.py) are carried along as they are. A
clip that is packed already is left alone, so run it again to continue. Prints what a frame costs.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.recordings import (
    GAMEFACTORY_FPS,
    Clip,
    ClipError,
    ClipWriter,
    clip_paths,
    depth_path,
    find_clips,
    is_whole,
    read_depth_file,
    read_gamefactory_entries,
    read_json,
    remove_parts,
)
from dataset.token_files import DataError
from runtime.config import positive_int
from runtime.errors import run_script
from runtime.video import VideoError, read_frames, resize, video_fps


@dataclass(frozen=True)
class Packing:
    """How clips are packed."""

    out: Path
    width: int
    height: int
    crf: int  # x264's constant rate factor: more is smaller and worse


def pack(clip: Clip, packing: Packing) -> str:
    """Packs one clip -> "", or why it cannot be packed."""
    packed_depth = depth_path(clip_paths(packing.out, clip.name)[1])
    if is_whole(packing.out, clip.name) and (packed_depth.is_file() or not depth_path(clip.video).is_file()):
        return ""
    try:
        content = read_json(clip.metadata)
        needed = len(read_gamefactory_entries(clip.metadata, content))
        surroundings = read_depth_file(clip.video, needed)
        fps = video_fps(clip.video) or GAMEFACTORY_FPS
        with ClipWriter(packing.out, clip.name, fps, crf=str(packing.crf), preset="slow") as packed:
            for frame in read_frames(clip.video, at_least=needed):
                packed.write(resize(frame, packing.height, packing.width))
            packed.finish(content, surroundings)
    except (ClipError, VideoError) as error:
        return str(error)
    return ""


def pack_all(clips: list[Clip], packing: Packing, jobs: int) -> Iterator[tuple[Clip, str]]:
    """Packs the clips, `jobs` at once; yields each with its outcome as it is done."""
    with ProcessPoolExecutor(jobs) as pool:
        pending = {pool.submit(pack, clip, packing): clip for clip in clips}
        for done in as_completed(pending):
            yield pending[done], done.result()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("clips", type=Path, help="folder with clips in GF-Minecraft's layout")
    parser.add_argument("out", type=Path, help="folder for the packed ones")
    parser.add_argument("--width", type=positive_int, default=128)
    parser.add_argument("--height", type=positive_int, default=72)
    parser.add_argument(
        "--crf", type=positive_int, default=20, help="x264's quality, 18 good .. 28 small (default 20)"
    )
    parser.add_argument("--jobs", type=positive_int, default=os.cpu_count() or 1, help="processes")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = build_parser().parse_args(arguments)
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Packs all clips and reports their size. Raises UserError."""
    packing = Packing(args.out, args.width, args.height, args.crf)
    _, clips = find_clips(args.clips, "gamefactory", args.out)
    remove_parts(args.out)
    skipped = []
    for clip, why in tqdm(pack_all(clips, packing, args.jobs), total=len(clips), unit="clip"):
        if why:
            skipped.append(f"{clip.name}: {why}")
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    packed = [clip_paths(args.out, clip.name) for clip in clips if is_whole(args.out, clip.name)]
    if not packed:
        raise DataError(f"{args.clips}: not one of {len(clips)} clips could be packed")
    frames = sum(len(read_gamefactory_entries(metadata)) for metadata, _ in packed)
    old = sum(clip.video.stat().st_size for clip in clips if clip.video.is_file())
    new = sum(video.stat().st_size for _, video in packed)
    print(
        f"{len(packed)} clips, {frames} frames: {new / 2**20:.1f} MB of video, {new / frames:.0f} bytes a "
        f"frame; it was {old / 2**20:.1f} MB"
    )


if __name__ == "__main__":
    raise SystemExit(main())
