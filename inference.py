#!/usr/bin/env python3
"""Rolls the world model out into a video, from a token file, a picture or a clip.

    python inference.py                                    # the start that ships, by its recorded actions
    python inference.py --start photo.jpg --script "w*32,yaw+0.5*16,idle*8"
    python inference.py --start clip.mp4 --context_frames 8 --frames 64 --out outputs/clip.webm

Without --script the actions are those recorded after the context, and the video shows truth | dream, where
truth is what the tokenizer makes of the real frames. Writes the video and, beside it, a contact sheet.

Scripts are segments ACTION[+ACTION...]*FRAMES with commas between them; actions are w, a, s, d, jump, idle,
yaw+0.5, pitch-0.2 and the like (yaw+1 turns 15 degrees right, pitch+1 looks 15 degrees down, in a frame).
The whole grammar is in action_script.py.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from action_script import WALK, captions, fit, parse
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
)
from video import check_ending, contact_sheet, enlarge, label, save_image, write_video

OUT = Path("outputs/rollout.mp4")
SCALE = 4
RECORDED_FRAMES = 160  # of recorded actions, unless --frames says otherwise


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
        help="what the player does, instead of what was recorded (default where nothing was: a walk)",
    )
    add(
        "--frames",
        type=count,
        help=f"frames to dream (default: all of a script, {RECORDED_FRAMES} of a recording); "
        "a script that is shorter is played again",
    )
    add("--fps", type=positive, help="frame rate of the video (default: that of the data)")
    add("--scale", type=count, default=SCALE, help="pixels for one (default: %(default)s)")
    add("--out", type=Path, default=OUT, help="video to write, .mp4 or .webm (default: %(default)s)")
    return parser


def choose_actions(
    args: argparse.Namespace, recording: Recording, context: Recording
) -> tuple[np.ndarray, bool]:
    """The actions to dream by [N, 5], and whether they are the recorded ones."""
    recorded = recording.actions[len(context) - 1 :].numpy()
    if args.script is None and len(recorded):
        frames = args.frames or RECORDED_FRAMES
        if args.frames and frames > len(recorded):
            print(f"{recording.name}: only {len(recorded)} actions after the context, so as many frames")
        return recorded[:frames], True
    if args.script is None:
        print(f"{recording.name}: no recorded actions after the context, so a scripted walk")
    script = parse(WALK if args.script is None else args.script)
    return fit(script, args.frames or len(script)), False


def run(args: argparse.Namespace) -> None:
    """One rollout, as the flags say; raises one of USER_ERRORS where they cannot be followed."""
    check_ending(args.out)
    if args.script is not None:
        parse(args.script)  # a slip shows before anything is loaded
    world = load_world(args)
    wanted = args.context_frames + (0 if args.script is not None else args.frames or RECORDED_FRAMES)
    recording = load_recording(args, world, wanted if args.context_frames else None)
    context = recording.first(args.context_frames)
    actions, recorded = choose_actions(args, recording, context)

    dream = dream_of(world, args)
    prime(dream, context)
    first = dream.pictures()[0].numpy()
    tokens, pictures = [], []
    began = time.perf_counter()
    for action in tqdm(torch.from_numpy(actions), desc="dream", unit="frame"):
        tokens.append(dream.step(action[None])[0].cpu())
        pictures.append(dream.pictures()[0].numpy())
    seconds = time.perf_counter() - began
    print(
        f"dreamed {len(actions)} frames from {recording.name} ({len(context)} of context): "
        f"{len(actions) / seconds:.1f} frames/s"
    )

    columns = {"dream": pictures}
    if recorded:
        truth = recording.tokens[len(context) : len(context) + len(actions)]
        true_pictures = list(decode(truth, world).numpy())
        columns = {"truth": true_pictures, "dream": pictures}
        compare(torch.stack(tokens), truth, pictures, true_pictures, first)
    write(args, world, actions, columns, first)


def compare(
    tokens: torch.Tensor,
    truth: torch.Tensor,
    pictures: list[np.ndarray],
    true_pictures: list[np.ndarray],
    first: np.ndarray,
) -> None:
    """Prints how near the dream [N, H, W] came to the truth, beside a picture that never changes."""
    target = to_float(torch.from_numpy(np.stack(true_pictures)))
    dreamed = psnr(to_float(torch.from_numpy(np.stack(pictures))), target).mean()
    still = psnr(to_float(torch.from_numpy(first)[None]), target).mean()
    accuracy = token_accuracy(tokens, truth).mean()
    print(
        f"against the decoded truth: PSNR {dreamed:.2f} dB (the start picture, held still: {still:.2f} dB), "
        f"token accuracy {accuracy:.3f}"
    )


def write(
    args: argparse.Namespace,
    world: World,
    actions: np.ndarray,
    columns: dict[str, list[np.ndarray]],
    first: np.ndarray,
) -> None:
    """Writes the video, columns side by side under their names, and the contact sheet, which begins with
    the last frame of the context."""

    def side_by_side(frames: tuple[np.ndarray, ...]) -> np.ndarray:
        large = [enlarge(frame, args.scale) for frame in frames]
        if len(large) > 1:
            large = [label(frame, name) for frame, name in zip(large, columns, strict=True)]
        return np.concatenate(large, 1)

    rows = list(zip(*columns.values(), strict=True))
    write_video(args.out, map(side_by_side, rows), args.fps or world.fps)
    sheet = args.out.with_suffix(".png")
    frames = [np.concatenate(row, 1) for row in [(first,) * len(columns), *rows]]
    save_image(
        sheet, contact_sheet(frames, [f"start ({' | '.join(columns)})", *captions(actions, world.fps)])
    )
    print(f"wrote {args.out} and {sheet}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(run, build_parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
