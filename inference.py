#!/usr/bin/env python3
"""Rolls the world model out into a video, from start places, token files, pictures or clips.

    python inference.py                                    # the first place that ships, as it was played
    python inference.py --start desert forest snow --frames 64 --out outputs/three.gif
    python inference.py --start photo.jpg --script "w*32,(yaw+0.5*8,yaw-0.5*8)*2"
    some_program | python inference.py --script - --out - | other_program

Without --script the actions are those recorded after the context, and the video shows truth | dream |
difference, where truth is what the tokenizer makes of the real frames. Several starts are dreamt at once and
shown in a grid. Writes the video (.mp4, .webm or .gif) and, beside it, a contact sheet.

Scripts are segments ACTION[+ACTION...]*FRAMES with commas between them; actions are w, a, s, d, jump, idle,
yaw+0.5, pitch-0.2 and the like (yaw+1 turns 15 degrees right, pitch+1 looks 15 degrees down, in a frame), or
[yaw, pitch, move_x, move_z, jump] in numbers. (...)*N repeats. The whole grammar is in action_script.py.

--script @FILE reads a script from a file, a line or more to a segment, # begins a comment; --save_actions
writes one. --script - reads lines from stdin and dreams each as soon as it comes. --out - writes each frame
to stdout as soon as it is made, RGB24; all words then go to stderr.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from action_script import WALK, captions, fit, parse, parse_lines, write_script
from metrics import psnr, token_accuracy
from sampling import to_float
from settings import count, positive
from start import (
    Recording,
    World,
    add_arguments,
    decode,
    dream_of,
    exit_status,
    load_recording,
    load_world,
    prime,
    starts,
)
from video import check_ending, contact_sheet, enlarge, grid, label, save_image, write_video

OUT = Path("outputs/rollout.mp4")
PIPE = "-"
SCALE = 4
RECORDED_FRAMES = 160  # of recorded actions, unless --frames says otherwise
COLUMNS = ("truth", "dream", "difference")
GAIN = 2  # by which differences are enlarged, so that they can be seen


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    add = parser.add_argument
    add(
        "--script",
        "--actions",
        metavar="SCRIPT",
        help="what the player does, instead of what was recorded (default where nothing was: a walk); "
        "@FILE: from a file, -: line by line from stdin",
    )
    add(
        "--frames",
        type=count,
        help=f"frames to dream (default: all of a script, {RECORDED_FRAMES} of a recording); "
        "a script that is shorter is played again",
    )
    add("--fps", type=positive, help="frame rate of the video (default: that of the data)")
    add("--scale", type=count, default=SCALE, help="pixels for one (default: %(default)s)")
    add(
        "--columns",
        nargs="+",
        choices=COLUMNS,
        help="what to show side by side (default: all three where the recorded actions are played)",
    )
    add("--save_actions", type=Path, metavar="FILE", help="write what was played, for --script @FILE")
    add(
        "--out",
        type=Path,
        default=OUT,
        help="video to write, .mp4, .webm or .gif, or - for frames on stdout (default: %(default)s)",
    )
    return parser


# ---------------------------------------------------------------- what to play


def align(recordings: list[Recording], frames: int) -> tuple[list[Recording], int]:
    """The recordings, cut so that all have a context of one length, and that length: the shortest one's.

    `frames` of context are asked for, 0 for all. Those with more give up the first ones.
    """
    lengths = [len(recording.first(frames)) for recording in recordings]
    shortest = min(lengths)
    if shortest < max(lengths):
        print(f"primed on the last {shortest} frames of each context: as many as the shortest one has")
    return [
        r.last(len(r) - length + shortest) for r, length in zip(recordings, lengths, strict=True)
    ], shortest


def choose_actions(
    args: argparse.Namespace, recordings: list[Recording], context: int
) -> tuple[Iterable[Tensor], int | None, bool]:
    """Actions to dream by, [B, 5] for each frame; how many, None where stdin decides; whether they are the
    recorded ones."""
    batch = len(recordings)
    recorded = min(len(recording) for recording in recordings) - context
    if args.script is None and recorded:
        frames = args.frames or RECORDED_FRAMES
        if args.frames and frames > recorded:
            print(f"only {recorded} actions were recorded after the context, so as many frames")
        actions = torch.stack([r.actions[context - 1 :][: min(frames, recorded)] for r in recordings])
        return actions.unbind(1), actions.shape[1], True
    if args.script == PIPE:
        lines = (torch.from_numpy(action).expand(batch, -1) for action in parse_lines(sys.stdin, "stdin"))
        return limit(lines, args.frames), args.frames, False
    if args.script is None:
        print("no recorded actions after the context, so a scripted walk")
    script = read_script(args.script)
    script = torch.from_numpy(fit(script, args.frames or len(script)))
    return script[:, None].expand(-1, batch, -1), len(script), False


def read_script(script: str | None) -> np.ndarray:
    """What --script says -> actions [N, 5]. Raises ScriptError or OSError."""
    if script is None:
        return parse(WALK)
    if not script.startswith("@"):
        return parse(script)
    with open(script[1:], encoding="utf-8") as file:
        return np.stack(list(parse_lines(file, script[1:])))


def limit(actions: Iterable[Tensor], frames: int | None) -> Iterator[Tensor]:
    """The first `frames` of them, all if it is None; no more are asked for."""
    for number, action in enumerate(actions, 1):
        yield action
        if number == frames:
            return


# ---------------------------------------------------------------- dreaming


def run(args: argparse.Namespace) -> None:
    """One rollout, as the flags say; raises one of USER_ERRORS where they cannot be followed."""
    piped = str(args.out) == PIPE
    stdout = sys.stdout
    if piped:
        sys.stdout = sys.stderr  # what is said must not get among the frames
    try:
        roll_out(args, stdout.buffer if piped else None)
    except BrokenPipeError:
        # Who read the frames has enough. What Python would still flush has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    finally:
        sys.stdout = stdout


def roll_out(args: argparse.Namespace, pipe) -> None:
    """Dreams and writes; `pipe`: where the frames go instead of into a video, or None."""
    if pipe is None:
        check_ending(args.out)
    if args.script not in (None, PIPE):
        read_script(args.script)  # a slip shows before anything is loaded
    paths = starts(args)
    if not (args.start or args.context_npz):
        paths = paths[:1]
    world = load_world(args)
    wanted = args.context_frames + (0 if args.script is not None else args.frames or RECORDED_FRAMES)
    recordings = [load_recording(path, world, wanted if args.context_frames else None) for path in paths]
    recordings, context = align(recordings, args.context_frames)
    actions, total, recorded = choose_actions(args, recordings, context)
    names = [Path(recording.name).stem for recording in recordings]
    if not recorded and args.columns not in (None, ["dream"]):
        print("nothing was recorded of these actions, so the dream alone is shown")

    dream = dream_of(world, args)
    prime(dream, [recording.first(context) for recording in recordings])
    first = dream.pictures().numpy()
    if pipe is not None:
        height, width = tile(enlarged(first, args.scale), names).shape[:2]
        print(
            f"stdout: {width}x{height} RGB24 at {args.fps or world.fps:g} frames/s; to look at it: "
            f"| ffplay -f rawvideo -pixel_format rgb24 -video_size {width}x{height} -"
        )
    tokens, pictures, played = [], [], []
    began = time.perf_counter()
    for action in tqdm(actions, desc="dream", unit="frame", total=total):
        tokens.append(dream.step(action).cpu())
        played.append(action[0].numpy())
        frame = dream.pictures().numpy()
        if pipe is None:
            pictures.append(frame)
        else:
            pipe.write(tile(enlarged(frame, args.scale), names).tobytes())
            pipe.flush()
    seconds = time.perf_counter() - began
    print(
        f"dreamed {len(tokens)} frames from {', '.join(names)} ({context} of context): "
        f"{len(tokens) * len(names) / seconds:.1f} frames/s"
    )
    if args.save_actions:
        if recorded and len(names) > 1:
            print(f"{args.save_actions}: the actions of {names[0]}; the others played their own")
        args.save_actions.parent.mkdir(parents=True, exist_ok=True)
        args.save_actions.write_text(write_script(np.array(played).reshape(-1, 5)))
        print(f"wrote {args.save_actions}")
    if not tokens:
        print("no action came, so there is nothing to write")
        return

    made = torch.stack(tokens, 1)  # [B, N, H, W]
    truth = None
    if recorded:
        target = torch.stack([r.tokens[context:][: made.shape[1]] for r in recordings])
        truth = np.stack([decode(t, world).numpy() for t in target], 1)  # [N, B, Hp, Wp, 3]
        compare(names, made, target, first, pictures, truth)
    if pipe is None:
        write(args, world, names, np.array(played), first, pictures, truth)


def compare(
    names: list[str],
    tokens: Tensor,
    target: Tensor,
    first: np.ndarray,
    pictures: list[np.ndarray],
    truth: np.ndarray,
) -> None:
    """Prints how near each dream came to the truth, beside a picture that never changes.

    tokens, target [B, N, H, W]; first [B, Hp, Wp, 3]; pictures and truth [N, B, Hp, Wp, 3].
    """
    rows = []
    for b, name in enumerate(names):
        true = to_float(torch.from_numpy(truth[:, b]))
        dreamt = psnr(to_float(torch.from_numpy(np.stack([p[b] for p in pictures]))), true).mean()
        still = psnr(to_float(torch.from_numpy(first[b : b + 1])), true).mean()
        rows.append((name, dreamt, still, token_accuracy(tokens[b], target[b]).mean()))
    if len(rows) > 1:
        rows.append(("mean", *(torch.stack(column).mean() for column in list(zip(*rows, strict=True))[1:])))
    for name, dreamt, still, accuracy in rows:
        print(
            f"{name}, against the decoded truth: PSNR {dreamt:.2f} dB (the start picture, held still: "
            f"{still:.2f} dB), token accuracy {accuracy:.3f}"
        )


# ---------------------------------------------------------------- showing


def enlarged(frames: np.ndarray, scale: int) -> list[np.ndarray]:
    """Pictures [B, H, W, 3], each enlarged."""
    return [enlarge(frame, scale) for frame in frames]


def tile(cells: list[np.ndarray], names: list[str], columns: int = 1) -> np.ndarray:
    """What is shown of each start [H, W, 3], `columns` pictures wide -> one picture; several in a grid about
    as wide as high, under their names."""
    if len(cells) == 1:
        return cells[0]
    named = [label(cell, name) for cell, name in zip(cells, names, strict=True)]
    return grid(named, int(np.ceil(np.sqrt(len(cells) / columns))))


def difference(dream: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Absolute difference of two pictures, times GAIN: uint8 of the same shape."""
    return (GAIN * np.abs(dream.astype(np.int16) - truth)).clip(0, 255).astype(np.uint8)


def write(
    args: argparse.Namespace,
    world: World,
    names: list[str],
    actions: np.ndarray,
    first: np.ndarray,
    pictures: list[np.ndarray],
    truth: np.ndarray | None,
) -> None:
    """Writes the video and the contact sheet, which begins with the last frame of the context.

    first [B, H, W, 3]; pictures and truth [N, B, H, W, 3]; truth None: the dream alone is shown.
    """
    columns = (args.columns or COLUMNS) if truth is not None else ["dream"]
    titles = [f"difference x{GAIN}" if column == "difference" else column for column in columns]

    def beside(dreamt: np.ndarray, true: np.ndarray | None) -> list[np.ndarray]:
        """The columns of one start, each [H, W, 3]."""
        if true is None:
            return [dreamt]
        of = {"truth": true, "dream": dreamt, "difference": difference(dreamt, true)}
        return [of[column] for column in columns]

    def shown(dreamt: np.ndarray, true: np.ndarray | None) -> np.ndarray:
        """A frame of the video: pictures of all starts [B, H, W, 3]."""
        cells = []
        for b in range(len(names)):
            large = enlarged(beside(dreamt[b], None if true is None else true[b]), args.scale)
            if len(large) > 1:
                large = [label(p, title) for p, title in zip(large, titles, strict=True)]
            cells.append(np.concatenate(large, 1))
        return tile(cells, names, len(columns))

    trues = [None] * len(pictures) if truth is None else list(truth)
    frames = (shown(dreamt, true) for dreamt, true in zip(pictures, trues, strict=True))
    write_video(args.out, frames, args.fps or world.fps)
    sheet = args.out.with_suffix(".png")
    # Of several starts those of one moment stand under each other.
    whole = [(first, None if truth is None else first), *zip(pictures, trues, strict=True)]
    cells = [
        np.concatenate(
            [
                np.concatenate(beside(dreamt[b], None if true is None else true[b]), 1)
                for b in range(len(names))
            ]
        )
        for dreamt, true in whole
    ]
    about = captions(actions, world.fps)
    if len(names) > 1 and truth is not None:  # each played its own
        about = [caption.split("  ")[0] for caption in about]
    save_image(sheet, contact_sheet(cells, [f"start ({' | '.join(titles)})", *about]))
    print(f"wrote {args.out} and {sheet}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(run, build_parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
