#!/usr/bin/env python3
"""Walk in the learned world with keyboard and mouse, in real time.

    python live_inference.py                        # a start screen with the places that ship
    python live_inference.py --start forest photo.jpg --temperature 0.8
    python live_inference.py --world my.zip         # a world in one file, from tools/pack_world.py
    python live_inference.py --compare              # recorded actions: truth | generated
    python live_inference.py --web                  # in a browser, here or through an SSH tunnel
    python live_inference.py --headless --script "w*64,yaw+0.3*32"

On the start screen click on a place, or drop a photo or a clip; any key starts. --start skips it. W A S D
walk, Space jumps. The mouse looks around after a click into the window; the arrow keys look without a mouse.
M shows the start screen again, R restarts, H shows all keys. Esc frees the mouse, Esc again quits.

A picture that has lost its detail fades back to the last good one; B does it by hand, --no_recovery turns it
off.

The world makes one step per frame of the data, 16 per second, never more; a machine that is too slow gets a
message. Without a display a scripted walk is written to a video instead.
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from playing.controls import MOUSE_SENS, Controls, StepClock
from playing.session import Session
from playing.window import Window, missing_display
from rollout.action_script import WALK, captions, fit, read_script
from rollout.arguments import RolloutConfig, add_arguments, config_of, input_files
from rollout.context import load_recording, load_world
from rollout.rollout import Rollout
from runtime.config import positive_float, positive_int
from runtime.errors import run_script
from runtime.outputs import check_outputs, sheet_path
from runtime.ranges import Port, flag
from runtime.video import check_ending, contact_sheet, enlarge, save_image, write_video

OUT = Path("outputs/play.mp4")
VIDEO_SCALE = 4
COMPARED_FRAMES = 480  # frames of a clip loaded after the context, to compare with
HOST, PORT = "127.0.0.1", 8000


@dataclass(frozen=True)
class LiveConfig:
    """What the flags ask for."""

    rollout: RolloutConfig
    fps: float | None  # steps per second; None: as the data
    compare: bool
    recover: bool  # go back by itself when the picture has lost its detail
    scale: int | None  # size of a pixel of the world; None: what fits the screen, VIDEO_SCALE in a video
    smooth: bool
    use_mouse: bool
    mouse_sens: float  # degrees per pixel of mouse motion
    web: bool
    host: str
    port: int
    token: bool  # --web asks for a token on loopback, too
    headless: bool
    script: str
    frames: int | None  # None: all of the script
    out: Path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    add = parser.add_argument
    add(
        "--fps",
        type=positive_float,
        help="steps per second, at most the frame rate of the data (default: that rate)",
    )
    add("--compare", action="store_true", help="use the recorded actions and show truth | generated")
    add(
        "--no_recovery",
        action="store_true",
        help="go on with a picture that has lost its detail; without this it fades back to the last good one",
    )
    add(
        "--scale",
        type=positive_int,
        help=f"size of a pixel of the world (default: what fits the screen; {VIDEO_SCALE} in a video)",
    )
    add("--smooth", action="store_true", help="interpolate the picture to fill the window")
    add("--no_mouse", action="store_true", help="do not use the mouse; look with the arrow keys")
    add(
        "--mouse_sens",
        type=positive_float,
        default=MOUSE_SENS,
        help="degrees of turn per pixel of mouse motion (default: %(default)s, as in Minecraft)",
    )
    add("--web", action="store_true", help="serve a web page to play in, instead of a window")
    add("--host", default=HOST, help="address that --web listens on (default: %(default)s)")
    add("--port", type=flag(Port), default=PORT, help="port that --web listens on (default: %(default)s)")
    add(
        "--token",
        action="store_true",
        help="with --web: ask for a token also on this machine, whose other users could play otherwise",
    )
    add("--headless", action="store_true", help="no window: write a scripted walk to a video")
    add(
        "--script",
        "--actions",
        metavar="SCRIPT",
        help='actions, e.g. "w*32,yaw+0.5*16", or @FILE (default: a walk); implies --headless',
    )
    add("--frames", type=positive_int, help="cut or repeat the script to this length; implies --headless")
    add("--out", type=Path, help=f"video to write, .mp4 or .webm (default: {OUT}); implies --headless")
    return parser


def parse_config(arguments: list[str] | None = None) -> LiveConfig:
    """The command line as a config. Raises DataError or SettingError for a bad value."""
    args = build_parser().parse_args(arguments)
    return LiveConfig(
        rollout=config_of(args),
        fps=args.fps,
        compare=args.compare,
        recover=not args.no_recovery,
        scale=args.scale,
        smooth=args.smooth,
        use_mouse=not args.no_mouse,
        mouse_sens=args.mouse_sens,
        web=args.web,
        host=args.host,
        port=args.port,
        token=args.token,
        headless=args.headless or any(v is not None for v in (args.script, args.frames, args.out)),
        script=WALK if args.script is None else args.script,
        frames=args.frames,
        out=args.out or OUT,
    )


def process_age() -> float:
    """Seconds since this process was created."""
    stat = Path("/proc/self/stat")
    if stat.is_file():  # Linux, where psutil is exact only to the second
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()


def print_first_frame() -> None:
    """Prints the time from the creation of the process to the first generated picture."""
    tqdm.write(f"first frame after {process_age():.1f} s")


def load_session(config: LiveConfig, only_first: bool) -> Session:
    """The session that the flags ask for; `only_first`: with only the first of its start places.

    Raises a UserError for a file that is missing, broken or of another tokenizer.
    """
    flags = config.rollout
    world = load_world(flags.checkpoint, flags.vqvae_ckpt, flags.device, flags.precision, flags.depth_ckpt)
    paths = flags.starts or flags.places
    frames = (flags.context_frames or None) if only_first and not config.compare else frames_to_read(config)
    recordings = [load_recording(path, world, frames) for path in (paths[:1] if only_first else paths)]
    rollout = Rollout(world.model, flags.sampling, flags.seed, world.dtype)
    return Session(world, rollout, recordings, flags.context_frames, recover=config.recover)


def frames_to_read(config: LiveConfig) -> int | None:
    """The number of frames of a clip to read: the context and what follows, to compare with; None: all."""
    context = config.rollout.context_frames
    return context + COMPARED_FRAMES if context else None


def start_screen_wanted(config: LiveConfig) -> bool:
    """Whether to begin with the start screen: unless the flags say where to start, or to compare."""
    return not config.rollout.starts and not config.compare


def run(config: LiveConfig) -> None:
    """Plays in a window, in a web page, or without a display. Raises UserError or OSError."""
    script = read_script(config.script)
    check_ending(config.out)
    check_outputs([config.out, sheet_path(config.out)], input_files(config.rollout, config.script))
    no_display = None if config.headless or config.web else missing_display()
    session = load_session(config, only_first=config.headless or no_display is not None)
    fps = session.world.fps
    if config.fps is not None:
        if config.fps > fps:
            print(f"--fps {config.fps:g}: more than the {fps:g} frames/s of the data; using {fps:g}")
        fps = min(config.fps, fps)
    if config.compare:
        print(session.command("compare"))
    if config.web:
        play_in_page(config, session, fps)
        return
    if not config.headless and no_display is None:
        no_display = play_in_window(config, session, fps)
        if no_display is None:
            return
    if no_display is not None:
        print(f"no display ({no_display}): writing a scripted walk to {config.out}; --web plays in a browser")
    actions = fit(script, config.frames or len(script))
    play_script(session, actions, fps, config.scale or VIDEO_SCALE, config.out)


def play_in_page(config: LiveConfig, session: Session, fps: float) -> None:
    """Serves the page until Ctrl-C."""
    from playing.web import serve  # here, so that the window needs no server

    try:
        serve(
            session,
            fps,
            config.mouse_sens,
            config.host,
            config.port,
            config.token,
            choose=start_screen_wanted(config),
            dropped_frames=frames_to_read(config),
        )
    finally:
        if message := session.stop_recording():
            print(message)


def play_in_window(config: LiveConfig, session: Session, fps: float) -> str | None:
    """Plays until the player quits -> None, or the reason if the window cannot be opened."""
    import pygame

    controls = Controls(fps, session.world.degrees_per_unit, config.mouse_sens)
    try:
        window = Window(
            session,
            controls,
            StepClock(fps),
            config.scale,
            config.use_mouse,
            config.smooth,
            print_first_frame,
            choose=start_screen_wanted(config),
            dropped_frames=frames_to_read(config),
        )
    except pygame.error as error:
        return f"pygame: {error}"
    window.run()
    return None


def play_script(session: Session, actions: np.ndarray, fps: float, scale: int, out: Path) -> None:
    """Plays actions [N, 5] without a display: writes a video and a contact sheet, and prints the speed."""
    frames = [session.picture]
    for action in tqdm(actions, desc="play", unit="step"):
        frames.append(session.step(action))
        if len(frames) == 2:
            print_first_frame()
    seconds = np.array(session.seconds).sum(1)
    p50, p95 = np.percentile(seconds * 1000, (50, 95))
    print(
        f"{len(seconds) / seconds.sum():.1f} frames/s over {len(seconds)} steps "
        f"(step p50 {p50:.1f} ms, p95 {p95:.1f} ms; the data has {fps:g} frames/s)"
    )
    write_video(out, (enlarge(frame, scale) for frame in frames[1:]), fps)
    sheet = sheet_path(out)
    save_image(sheet, contact_sheet(frames, ["start", *captions(actions, fps)]))
    print(f"wrote {out} and {sheet}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_script(lambda: run(parse_config(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
