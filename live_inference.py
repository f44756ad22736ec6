#!/usr/bin/env python3
"""Walk in the learned world, with keyboard and mouse, in real time.

    python live_inference.py                        # the world and the places that ship
    python live_inference.py --start forest photo.jpg --temperature 0.8
    python live_inference.py --compare              # a recording's actions: truth | rollout
    python live_inference.py --web                  # in a browser, here or through an SSH tunnel
    python live_inference.py --headless --script "w*64,yaw+0.3*32"

W A S D walk, Space jumps, the mouse looks around once it was clicked into the window, the arrow keys look
without a mouse. N goes on to the next place, R starts again, H shows all keys. Esc lets go of the mouse, Esc
once more quits.

The world takes one step for each frame of the data, 16 a second, and never goes faster; a machine that is
too slow says so. Where there is no display a scripted walk is played into a video instead.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from playing.controls import MOUSE_SENS, Controls, StepClock
from playing.session import Session
from playing.window import Window, missing_display
from rollout.action_script import WALK, captions, fit, parse
from rollout.context import add_arguments, load_recording, load_world, rollout_of, starts
from runtime.config import positive_float, positive_int
from runtime.errors import run_script
from runtime.video import check_ending, contact_sheet, enlarge, save_image, write_video

OUT = Path("outputs/play.mp4")
VIDEO_SCALE = 4
COMPARED_FRAMES = 480  # after the context that a rollout can be compared with
HOST, PORT = "127.0.0.1", 8000


def age() -> float:
    """Seconds since this process was created."""
    stat = Path("/proc/self/stat")
    if stat.is_file():  # Linux, where psutil counts from the boot, which it knows to a second only
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()


def say_first_frame() -> None:
    """How long it took from the start of the process to the first generated picture."""
    tqdm.write(f"first frame after {age():.1f} s")


def play_script(session: Session, actions: np.ndarray, fps: float, scale: int, out: Path) -> None:
    """Plays actions [N, 5] without a window; writes a video of the N frames and a contact sheet, prints the
    speed."""
    frames = [session.picture]
    for action in tqdm(actions, desc="play", unit="step"):
        frames.append(session.step(action))
        if len(frames) == 2:
            say_first_frame()
    took = np.array(session.seconds).sum(1)
    p50, p95 = np.percentile(took * 1000, (50, 95))
    print(
        f"{len(took) / took.sum():.1f} frames/s over {len(took)} steps "
        f"(step p50 {p50:.1f} ms, p95 {p95:.1f} ms; the data has {fps:g} frames/s)"
    )
    write_video(out, (enlarge(frame, scale) for frame in frames[1:]), fps)
    sheet = out.with_suffix(".png")
    save_image(sheet, contact_sheet(frames, ["start", *captions(actions, fps)]))
    print(f"wrote {out} and {sheet}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    add = parser.add_argument
    add(
        "--fps",
        type=positive_float,
        help="steps a second, never more than the data has (default: as the data)",
    )
    add("--compare", action="store_true", help="play the recorded actions: truth beside rollout")
    add(
        "--scale",
        type=positive_int,
        help=f"pixels for one (default: what fits the screen; {VIDEO_SCALE} in a video)",
    )
    add("--smooth", action="store_true", help="a smooth picture that fills the window, not whole pixels")
    add("--no_mouse", action="store_true", help="leave the mouse alone; look with the arrow keys")
    add(
        "--mouse_sens",
        type=positive_float,
        default=MOUSE_SENS,
        help="degrees of turn for a pixel of mouse motion (default: %(default)s, as in Minecraft)",
    )
    add("--web", action="store_true", help="serve a page to play in, instead of a window")
    add(
        "--host",
        default=HOST,
        help="address that --web listens on (default: %(default)s)",
    )
    add("--port", type=positive_int, default=PORT, help="port that --web listens on (default: %(default)s)")
    add("--headless", action="store_true", help="no window: play a script into a video")
    add(
        "--script",
        "--actions",
        metavar="SCRIPT",
        help='what to play, e.g. "w*32,yaw+0.5*16" (default: a walk); implies --headless',
    )
    add("--frames", type=positive_int, help="cut or repeat the script to so many frames; implies --headless")
    add("--out", type=Path, help=f"video to write, .mp4 or .webm (default: {OUT}); implies --headless")
    return parser


def run(args: argparse.Namespace) -> None:
    """Plays in a window, a page, or without one; raises a UserError where the flags cannot be
    followed."""
    headless = args.headless or any(v is not None for v in (args.script, args.frames, args.out))
    script, out = parse(WALK if args.script is None else args.script), args.out or OUT
    check_ending(out)
    reason = None if headless or args.web else missing_display()
    world = load_world(args)
    alone = headless or reason is not None
    paths = starts(args)[: 1 if alone else None]
    later = 0 if alone and not args.compare else COMPARED_FRAMES
    frames = args.context_frames + later if args.context_frames else None
    places = [load_recording(path, world, frames) for path in paths]
    fps = world.fps
    if args.fps is not None:
        fps = min(args.fps, world.fps)
        if args.fps > fps:
            print(f"--fps {args.fps:g}: the world learned from {fps:g} frames/s and goes no faster")
    session = Session(world, rollout_of(world, args), places, args.context_frames)
    if args.compare:
        print(session.command("compare"))
    if args.web:
        from playing.web import serve  # here, so that the window does without a server

        try:
            serve(session, fps, args.mouse_sens, args.host, args.port)
        finally:
            if said := session.end_take():
                print(said)
        return
    if not headless and reason is None:
        reason = play_in_window(args, session, fps)
        if reason is None:
            return
    if reason is not None:
        print(f"no display ({reason}): playing a scripted walk into {out}; --web plays in a browser")
    play_script(session, fit(script, args.frames or len(script)), fps, args.scale or VIDEO_SCALE, out)


def play_in_window(args: argparse.Namespace, session: Session, fps: float) -> str | None:
    """Plays until the player quits; says why if the window cannot be opened."""
    import pygame

    controls = Controls(fps, session.world.degrees_per_unit, args.mouse_sens)
    clock, mouse = StepClock(fps), not args.no_mouse
    try:
        window = Window(session, controls, clock, args.scale, mouse, args.smooth, say_first_frame)
    except pygame.error as error:
        return f"pygame: {error}"
    window.run()
    return None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = build_parser().parse_args(arguments)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
