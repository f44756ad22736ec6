#!/usr/bin/env python3
"""Cuts start places out of token files, like those in checkpoints/starts.

python tools/cut_start_places.py tokens/mine outputs/starts meadow=clip_0001:120
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.token_files import (
    MANIFEST,
    ClipEntry,
    DataError,
    Manifest,
    read_token_file,
    write_token_file,
)
from runtime.config import ScriptParser
from runtime.errors import run_script
from runtime.outputs import check_outputs, make_folder

EXAMPLE = "python tools/cut_start_places.py samples/tokens outputs/starts desert=clip_07_00000:100  (seconds)"

START_PLACE_FRAMES = 161  # 16 of context, and nine seconds to compare a rollout with


def parse_start_places(words: Sequence[str]) -> dict[str, tuple[str, int]]:
    """["NAME=CLIP:FRAME", ...] -> {name: (clip, first frame)}. Raises DataError for any other form."""
    start_places = {}
    for word in words:
        match = re.fullmatch(r"(\w+)=(.+):(\d+)", word)
        if match is None:
            raise DataError(f"{word}: expected NAME=CLIP:FRAME, e.g. meadow=clip_0001:120")
        start_places[match[1]] = match[2], int(match[3])
    return start_places


def cut_start_places(source: Path, target: Path, start_places: Mapping[str, tuple[str, int]]) -> None:
    """Writes START_PLACE_FRAMES frames of each start place, and a manifest, into the folder `target`.

    `source` is a folder of token files, `start_places` maps a name to a clip and its first frame. Raises
    DataError for a clip that does not exist or is too short, OutputError if a file would be overwritten.
    """
    manifest = Manifest.load(source)
    clips = {clip.name: clip for clip in manifest.clips}
    entries = []
    check_outputs([target / MANIFEST, *(target / f"{name}.npz" for name in start_places)], [source])
    for clip, first in start_places.values():
        if clip not in clips or clips[clip].frames < first + START_PLACE_FRAMES:
            raise DataError(
                f"{source}: no clip {clip} of {first + START_PLACE_FRAMES} frames; name another clip or an "
                "earlier frame"
            )
    contents = {
        clip: read_token_file(source / clips[clip].file, (), manifest.codebook_size, clips[clip].frames)
        for clip, _ in start_places.values()
    }
    make_folder(target)
    for name, (clip, first) in start_places.items():
        content = contents[clip]
        last = first + START_PLACE_FRAMES - 1
        file = f"{name}.npz"
        write_token_file(
            target / file,
            content["tokens"][first : last + 1],
            content["actions"][first:last],
            content["pose"][first : last + 1],
        )
        entries.append(
            ClipEntry(name, file, START_PLACE_FRAMES, clips[clip].split, f"{clip}.mp4", [first, last, 1])
        )
    replace(manifest, clips=entries, skipped=[]).save(target)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = ScriptParser(description=__doc__, example=EXAMPLE)
    parser.add_argument("source", type=Path, help="folder of token files")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("start_places", nargs="+", metavar="NAME=CLIP:FRAME", help="name, clip, first frame")
    args = parser.parse_args(arguments)
    return run_script(
        lambda: cut_start_places(args.source, args.target, parse_start_places(args.start_places))
    )


if __name__ == "__main__":
    raise SystemExit(main())
