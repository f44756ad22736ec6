#!/usr/bin/env python3
"""Rolls the world model out into a video, from start places, token files, pictures or clips.

    python inference.py                                    # the first place that ships, as it was played
    python inference.py --start desert forest snow --frames 64 --out outputs/three.gif
    python inference.py --start photo.jpg --script "w*32,(yaw+0.5*8,yaw-0.5*8)*2"
    some_program | python inference.py --script - --out - | other_program

Without --script the actions are those recorded after the context, and the video shows truth | rollout |
difference, where truth is what the tokenizer makes of the real frames. Several starts are generated at once and
shown in a grid. Writes the video (.mp4, .webm or .gif) and, beside it, a contact sheet.

--script @FILE reads a script from a file, a script a line, # begins a comment; --save_actions writes one.
--script - reads such lines from stdin and rollouts each as soon as it comes. --out - writes each frame of the
rollout to stdout as soon as it is made: HEIGHT x WIDTH x 3 bytes, RGB, several starts in a grid without names;
all words then go to stderr. So a program in the loop writes a line and reads a frame for each action in it.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.actions import ACTION_DIM
from dataset.token_files import DataError
from metrics import psnr, token_accuracy
from rollout import action_script
from rollout.action_script import WALK, ScriptError, captions, fit, parse, parse_lines, write_script
from rollout.context import (
    Recording,
    World,
    add_arguments,
    decode,
    load_recording,
    load_world,
    prime,
    rollout_of,
    starts,
)
from rollout.rollout import Rollout
from runtime.config import positive_float, positive_int
from runtime.errors import run_script
from runtime.video import (
    SHEET_HEIGHT,
    check_ending,
    contact_sheet,
    enlarge,
    grid,
    label,
    save_image,
    spread,
    to_float,
    write_video,
)

OUT = Path("outputs/rollout.mp4")
PIPE = "-"
SCALE = 4
RECORDED_FRAMES = 160  # of recorded actions, unless --frames says otherwise
COLUMNS = ("truth", "rollout", "difference")
GAIN = 2  # by which differences are enlarged, so that they can be seen


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"--script: {action_script.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
        type=positive_int,
        help=f"frames to rollout (default: all of a script, {RECORDED_FRAMES} of a recording); "
        "a script that is shorter is played again, stdin is not",
    )
    add("--fps", type=positive_float, help="frame rate of the video (default: that of the data)")
    add("--scale", type=positive_int, default=SCALE, help="pixels for one (default: %(default)s)")
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
    """Actions to rollout by, [B, 5] for each frame; how many, None where stdin decides; whether they are the
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
        sys.stdin.reconfigure(errors="replace")  # what is no text is then refused as any bad line is
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
    with open(script[1:], encoding="utf-8", errors="replace") as file:
        actions = list(parse_lines(file, script[1:]))
    if not actions:
        raise ScriptError(f"{script[1:]}: expected a script in each line, found no action; write some")
    return np.stack(actions)


def limit(actions: Iterable[Tensor], frames: int | None) -> Iterator[Tensor]:
    """The first `frames` of them, all if it is None; no more are asked for."""
    for number, action in enumerate(actions, 1):
        yield action
        if number == frames:
            return


# ---------------------------------------------------------------- rolling out


@dataclass
class GeneratedFrames:
    """What was generated of B starts, frame by frame, and how long that took."""

    played: list[np.ndarray] = field(default_factory=list)  # [5], the first start's actions
    tokens: list[Tensor] = field(default_factory=list)  # [B, H, W]
    pictures: list[np.ndarray] = field(default_factory=list)  # [B, Hp, Wp, 3]
    seconds: float = 0.0


def run(args: argparse.Namespace) -> None:
    """One rollout, as the flags say; raises a UserError where they cannot be followed."""
    if str(args.out) != PIPE:
        check_ending(args.out)
        roll_out(args, None)
        return
    pipe = sys.stdout.buffer
    if pipe.isatty():
        raise DataError(
            "--out -: expected a program or a file that takes the frames, found a terminal; add | or >"
        )
    with redirect_stdout(sys.stderr):  # what is said must not get among the frames
        roll_out(args, pipe)


def roll_out(args: argparse.Namespace, pipe: BinaryIO | None) -> None:
    """Rollouts and writes; `pipe`: where the frames go instead of into a video, or None."""
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
    if args.columns not in (None, ["rollout"]) and not (recorded and pipe is None):
        why = "stdout takes no more" if recorded else "nothing was recorded of these actions"
        print(f"{why}, so the rollout alone is shown")

    rollout = rollout_of(world, args)
    prime(rollout, [recording.first(context) for recording in recordings])
    first = rollout.pictures().numpy()
    if pipe is not None:
        frame = tile(enlarged(first, args.scale))
        size, rate = f"{frame.shape[1]}x{frame.shape[0]}", f"{args.fps or world.fps:g}"
        print(
            f"stdout: {size} RGB24 at {rate} frames/s, {frame.nbytes} bytes a frame; for a video: | "
            f"ffmpeg -f rawvideo -pixel_format rgb24 -video_size {size} -framerate {rate} -i - out.mp4"
        )
    # The bar would get among what is typed.
    bar = tqdm(actions, desc="rollout", unit="frame", total=total, disable=args.script == PIPE)
    made = play(rollout, bar, args.scale, pipe, keep=pipe is None or recorded)
    print(
        f"generated {len(made.played)} frames from {', '.join(names)} ({context} of context): "
        f"{len(made.played) * len(names) / max(made.seconds, 1e-9):.1f} frames/s"
        + (" of all together" if len(names) > 1 else "")
    )
    if args.save_actions:
        if recorded and len(names) > 1:
            print(f"{args.save_actions}: the actions of {names[0]}; the others played their own")
        args.save_actions.parent.mkdir(parents=True, exist_ok=True)
        args.save_actions.write_text(write_script(np.array(made.played).reshape(-1, ACTION_DIM)))
        print(f"wrote {args.save_actions}")
    if not made.played:
        print("no action came, so there is nothing to write")
        return

    truth = None
    if recorded:
        target = torch.stack([r.tokens[context:][: len(made.tokens)] for r in recordings])  # [B, N, H, W]
        truth = np.stack([decode(t, world).numpy() for t in target], 1)  # [N, B, Hp, Wp, 3]
        compare(names, torch.stack(made.tokens, 1), target, first, made.pictures, truth)
    if pipe is None:
        write(args, world, names, np.array(made.played), first, made.pictures, truth)


def play(
    rollout: Rollout, actions: Iterable[Tensor], scale: int, pipe: BinaryIO | None, keep: bool
) -> GeneratedFrames:
    """Rollouts a frame for each of the actions [B, 5], and writes it to the pipe before it asks for the next.

    Ends early, and says so, where the other end of the pipe is closed. Without `keep` tokens and pictures are
    dropped: a program may stay in the loop for hours.
    """
    made = GeneratedFrames()
    try:
        for action in actions:
            began = time.perf_counter()
            tokens = rollout.step(action).cpu()
            frame = rollout.pictures().numpy()
            made.seconds += time.perf_counter() - began  # not what it took another program to think
            made.played.append(action[0].numpy())
            if keep:
                made.tokens.append(tokens)
                made.pictures.append(frame)
            if pipe is not None:
                pipe.write(tile(enlarged(frame, scale)).tobytes())
                pipe.flush()
    except BrokenPipeError:
        print("stdout was closed by who read it, so this is the end")
        # What is left in the buffer would raise once more when Python flushes it at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())
    return made


def compare(
    names: list[str],
    tokens: Tensor,
    target: Tensor,
    first: np.ndarray,
    pictures: list[np.ndarray],
    truth: np.ndarray,
) -> None:
    """Prints how near each rollout came to the truth, beside a picture that never changes.

    tokens, target [B, N, H, W]; first [B, Hp, Wp, 3]; pictures and truth [N, B, Hp, Wp, 3].
    """
    rows = []
    for b, name in enumerate(names):
        true = to_float(torch.from_numpy(truth[:, b]))
        generated = psnr(to_float(torch.from_numpy(np.stack([p[b] for p in pictures]))), true).mean()
        still = psnr(to_float(torch.from_numpy(first[b : b + 1])), true).mean()
        rows.append((name, generated, still, token_accuracy(tokens[b], target[b]).mean()))
    if len(rows) > 1:
        rows.append(("mean", *(torch.stack(column).mean() for column in list(zip(*rows, strict=True))[1:])))
    for name, generated, still, accuracy in rows:
        print(
            f"{name}, against the decoded truth: PSNR {generated:.2f} dB (the start picture, held still: "
            f"{still:.2f} dB), token accuracy {accuracy:.3f}"
        )


# ---------------------------------------------------------------- showing


def enlarged(frames: np.ndarray, scale: int) -> list[np.ndarray]:
    """Pictures [B, H, W, 3], each enlarged."""
    return [enlarge(frame, scale) for frame in frames]


def tile(cells: list[np.ndarray], names: list[str] | None = None, columns: int = 1) -> np.ndarray:
    """What is shown of each start [H, W, 3], `columns` pictures wide -> one picture; several in a grid about
    as wide as high in pictures, under their names."""
    if len(cells) > 1 and names:
        cells = [label(cell, name) for cell, name in zip(cells, names, strict=True)]
    return grid(cells, math.ceil(math.sqrt(len(cells) / columns)))


def difference(rollout: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Absolute difference of two pictures, times GAIN: uint8 of the same shape."""
    return (GAIN * np.abs(rollout.astype(np.int16) - truth)).clip(0, 255).astype(np.uint8)


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

    first [B, H, W, 3]; pictures and truth [N, B, H, W, 3]; truth None: the rollout alone is shown.
    """
    columns = (args.columns or COLUMNS) if truth is not None else ["rollout"]
    titles = [f"difference x{GAIN}" if column == "difference" else column for column in columns]

    def shown(generated: np.ndarray, true: np.ndarray | None, scale: int) -> np.ndarray:
        """A frame of the video: of all starts [B, H, W, 3] the columns."""
        of = {"rollout": generated}
        if true is not None:
            of |= {"truth": true, "difference": difference(generated, true)}
        cells = []
        for b in range(len(names)):
            large = [enlarge(of[column][b], scale) for column in columns]
            if len(large) > 1:
                large = [label(picture, title) for picture, title in zip(large, titles, strict=True)]
            cells.append(np.concatenate(large, 1))
        return tile(cells, names, len(columns))

    trues = [None] * len(pictures) if truth is None else list(truth)
    frames = (shown(generated, true, args.scale) for generated, true in zip(pictures, trues, strict=True))
    write_video(args.out, frames, args.fps or world.fps)
    sheet = args.out.with_suffix(".png")
    whole = [(first, None if truth is None else first), *zip(pictures, trues, strict=True)]
    about = captions(actions, world.fps)
    if len(names) > 1 and truth is not None:  # each played its own
        about = [caption.split("  ")[0] for caption in about]
    about = [f"start ({' | '.join(titles)})", *about]
    chosen = spread(len(whole))
    scale = max(1, round(SHEET_HEIGHT / shown(*whole[0], 1).shape[0]))  # names are not enlarged
    save_image(sheet, contact_sheet([shown(*whole[i], scale) for i in chosen], [about[i] for i in chosen]))
    print(f"wrote {args.out} and {sheet}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = build_parser().parse_args(arguments)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
