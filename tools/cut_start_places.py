#!/usr/bin/env python3
"""Cuts start places out of token files.

python tools/cut_start_places.py tokens/mine outputs/starts meadow=clip_0001:120
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.token_files import (
    ClipEntry,
    DataError,
    Manifest,
    read_token_file,
    write_token_file,
)
from runtime.errors import run_script

PLACE_FRAMES = 161  # of a start place: 16 to prime on, nine seconds to compare a rollout with


def cut_places(source: Path, target: Path, wanted: dict[str, tuple[str, int]]) -> None:
    """Cuts start places out of the token files of the folder `source`: name -> (clip, first frame).

    Writes `PLACE_FRAMES` frames of each and a manifest. Raises DataError for a clip that is not there or too
    short.
    """
    manifest = Manifest.load(source)
    clips = {clip.name: clip for clip in manifest.clips}
    entries = []
    target.mkdir(parents=True, exist_ok=True)
    for name, (clip, first) in wanted.items():
        if clip not in clips or clips[clip].frames < first + PLACE_FRAMES:
            raise DataError(
                f"{source}: no clip {clip} of {first + PLACE_FRAMES} frames; give one that it has"
            )
        content = read_token_file(source / clips[clip].file)
        last = first + PLACE_FRAMES - 1
        file = f"{name}.npz"
        write_token_file(
            target / file,
            content["tokens"][first : last + 1],
            content["actions"][first:last],
            content["pose"][first : last + 1],
        )
        entries.append(
            ClipEntry(name, file, PLACE_FRAMES, clips[clip].split, f"{clip}.mp4", [first, last, 1])
        )
    replace(manifest, clips=entries, skipped=[]).save(target)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="cuts start places out of token files")
    parser.add_argument("source", type=Path, help="folder of token files")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("places", nargs="+", metavar="NAME=CLIP:FRAME", help="name, clip, first frame")

    args = parser.parse_args(arguments)

    def run() -> None:
        wanted = {}
        for word in args.places:
            match = re.fullmatch(r"(\w+)=(.+):(\d+)", word)
            if match is None:
                raise DataError(f"{word}: expected NAME=CLIP:FRAME")
            wanted[match[1]] = match[2], int(match[3])
        cut_places(args.source, args.target, wanted)

    return run_script(run)


if __name__ == "__main__":
    raise SystemExit(main())
