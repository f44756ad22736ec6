#!/usr/bin/env python3
"""Copies clips with smaller pictures, to move them to another machine. The layout stays the same.

    python tools/pack.py data/luanti outputs/luanti-128x72
    tar czf luanti.tar.gz -C outputs luanti-128x72

The pictures are shrunk to the world model's size; metadata and depth files are copied unchanged. Packed clips
can be read like recorded ones. Clips that are already packed are skipped, so run it again to continue.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

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
    gamefactory_track,
    is_complete,
    read_depth_file,
    read_gamefactory_entries,
    read_json,
    remove_unfinished,
)
from dataset.token_files import DataError
from runtime.config import ScriptParser, positive_int
from runtime.errors import run_script
from runtime.folder_lock import lock_folder
from runtime.outputs import OutputError, check_folder, check_outputs
from runtime.ranges import PictureSide, Range, flag
from runtime.video import VideoError, read_frames, resize, video_fps
from runtime.worker_process import end_with_parent

EXAMPLE = "python tools/pack.py samples outputs/samples-128x72  (half a minute)"

Quality = Annotated[int, Range(0, 51)]  # x264's constant rate factor


@dataclass(frozen=True)
class Packing:
    """The parsed command line."""

    clips_dir: Path
    out: Path
    width: int  # pixels
    height: int
    crf: int  # x264's constant rate factor: higher values give smaller files and lower quality
    jobs: int


def pack(clip: Clip, packing: Packing) -> str:
    """Packs one clip; returns "" or the reason why it cannot be packed."""
    packed_depth = depth_path(clip_paths(packing.out, clip.name)[1])
    if is_complete(packing.out, clip.name) and (
        packed_depth.is_file() or not depth_path(clip.video).is_file()
    ):
        return ""
    try:
        content = read_json(clip.metadata)
        entries = read_gamefactory_entries(clip.metadata, content)
        gamefactory_track(entries, clip.metadata)  # raises for a clip that preprocess.py would skip
        needed = len(entries)
        surroundings = read_depth_file(clip.video, needed)
        fps = video_fps(clip.video) or GAMEFACTORY_FPS
        with ClipWriter(packing.out, clip.name, fps, crf=str(packing.crf), preset="slow") as packed:
            for frame in read_frames(clip.video, at_least=needed):
                packed.write(resize(frame, packing.height, packing.width))
            packed.finish(content, surroundings)
    except (ClipError, VideoError, OutputError) as error:
        return str(error)
    return ""


def clip_files(metadata: Path, video: Path) -> tuple[Path, ...]:
    """All files of a clip, whether they exist or not."""
    return metadata, video, depth_path(video)


def pack_all(clips: list[Clip], packing: Packing) -> Iterator[tuple[Clip, str]]:
    """Packs the clips in `jobs` processes; yields each clip with the result of `pack` when it is finished."""
    with ProcessPoolExecutor(packing.jobs, initializer=end_with_parent) as pool:
        pending = {pool.submit(pack, clip, packing): clip for clip in clips}
        for done in as_completed(pending):
            yield pending[done], done.result()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ScriptParser(description=__doc__, example=EXAMPLE, allow_abbrev=False)
    parser.add_argument("clips", type=Path, help="folder with clips in GF-Minecraft's layout")
    parser.add_argument("out", type=Path, help="folder for the packed clips")
    add = parser.add_argument
    add("--width", type=flag(PictureSide), default=128, help="pixels (default 128)")
    add("--height", type=flag(PictureSide), default=72, help="pixels (default 72)")
    crf_help = "x264's quality, 18 (good) to 28 (small) (default 20)"
    add("--crf", type=flag(Quality), default=20, help=crf_help)
    jobs_help = "processes (default: one per core)"
    add("--jobs", type=positive_int, default=os.cpu_count() or 1, help=jobs_help)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = build_parser().parse_args(arguments)
    packing = Packing(args.clips, args.out, args.width, args.height, args.crf, args.jobs)
    return run_script(lambda: run(packing))


def run(packing: Packing) -> None:
    """Packs all clips and prints their size. Raises UserError."""
    with lock_folder(packing.out, "pack.py", "folder"):
        pack_folder(packing)


def pack_folder(packing: Packing) -> None:
    """As `run`, in a folder that no other run uses."""
    _, clips = find_clips(packing.clips_dir, "gamefactory", packing.out)
    check_folder(packing.out)
    packed = [path for clip in clips for path in clip_files(*clip_paths(packing.out, clip.name))]
    check_outputs(packed, [path for clip in clips for path in clip_files(clip.metadata, clip.video)])
    remove_unfinished(packing.out)
    skipped = []
    for clip, reason in tqdm(pack_all(clips, packing), total=len(clips), unit="clip"):
        if reason:
            skipped.append(f"{clip.name}: {reason}")
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    packed = [clip_paths(packing.out, clip.name) for clip in clips if is_complete(packing.out, clip.name)]
    if not packed:
        raise DataError(
            f"{packing.clips_dir}: none of {len(clips)} clips could be packed; the reasons are above; record "
            "them again"
        )
    frames = sum(len(read_gamefactory_entries(metadata)) for metadata, _ in packed)
    old = sum(clip.video.stat().st_size for clip in clips if clip.video.is_file())
    new = sum(video.stat().st_size for _, video in packed)
    print(
        f"{len(packed)} clips, {frames} frames: {new / 2**20:.1f} MB of video, {new / frames:.0f} bytes per "
        f"frame; before {old / 2**20:.1f} MB"
    )


if __name__ == "__main__":
    raise SystemExit(main())
