#!/usr/bin/env python3
"""Walk in the learned world, with keyboard and mouse, in real time.

    python live_inference.py                        # the world and the start that ship
    python live_inference.py --start photo.jpg --temperature 0.8
    python live_inference.py --headless --script "w*64,yaw+0.3*32"

W A S D walk, Space jumps, the mouse looks around once it was clicked into the window, the arrow keys look
without a mouse. R starts again. Esc lets go of the mouse, Esc once more quits.

The world takes one step for each frame of the data, 16 a second, and never goes faster; a machine that is
too slow says so. Where there is no display a scripted walk is played into a video instead.
"""

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm

from action_script import WALK, captions, fit, parse
from actions import ACTION_DIM, DEGREES_PER_UNIT, PITCH, YAW, encode, from_keys
from sampling import Dream
from settings import count, positive
from start import (
    Recording,
    World,
    add_arguments,
    dream_of,
    exit_status,
    load_recording,
    load_world,
    prime,
)
from video import check_ending, contact_sheet, enlarge, save_image, write_video

OUT = Path("outputs/play.mp4")
VIDEO_SCALE = 4
MOUSE_SENS = 0.15  # degrees a pixel, as in Minecraft at its default setting
ARROW_DEGREES_PER_SECOND = 90.0
SCREEN_SHARE = 0.8  # of the screen's sides that a new window may take
TITLE = "Ochre"


class Controls:
    """What the player holds and how far the mouse went, and the action that this means.

    Controls are forward, back, left, right, jump, look_left, look_right, look_up and look_down.
    """

    # What a hand turns faster than the data ever did is carried over into the next steps, so that a pixel
    # always turns as far. No more than this many steps' worth: the view has to stop with the hand.
    CARRY_STEPS = 4

    def __init__(
        self, fps: float, degrees_per_unit: float = DEGREES_PER_UNIT, degrees_per_pixel: float = MOUSE_SENS
    ):
        self.fps, self.degrees_per_unit, self.degrees_per_pixel = fps, degrees_per_unit, degrees_per_pixel
        self.held: set[str] = set()
        self.tapped: set[str] = set()  # pressed since the last step, even if let go since
        self.turn = np.zeros(2)  # degrees of [yaw, pitch] that the mouse asked for and no step has made

    def press(self, control: str) -> None:
        self.held.add(control)
        self.tapped.add(control)

    def release(self, control: str) -> None:
        self.held.discard(control)

    def look(self, right: float, down: float) -> None:
        """The mouse went so many pixels."""
        limit = self.CARRY_STEPS * self.degrees_per_unit
        self.turn = np.clip(self.turn + np.array([right, down]) * self.degrees_per_pixel, -limit, limit)

    def stop_turning(self) -> None:
        """Forgets the mouse motion that no step has made."""
        self.turn = np.zeros(2)

    def let_go(self) -> None:
        """Forgets everything that is held: the window does not see keys that are let go while it has no
        focus."""
        self.held.clear()
        self.tapped.clear()
        self.stop_turning()

    def take_action(self) -> np.ndarray:
        """The action of this step [5]; what it uses up (taps, mouse motion) does not count again."""
        active = self.held | self.tapped
        self.tapped.clear()
        # A turn of more than one unit a frame was never seen; the rest is left for the next step.
        turn = np.clip(self.turn, -self.degrees_per_unit, self.degrees_per_unit)
        self.turn = self.turn - turn
        arrows = np.array(
            [
                ("look_right" in active) - ("look_left" in active),
                ("look_down" in active) - ("look_up" in active),
            ]
        )
        yaw, pitch = turn + arrows * (ARROW_DEGREES_PER_SECOND / self.fps)
        return encode(yaw, pitch, *from_keys(active), degrees_per_unit=self.degrees_per_unit)


class Session:
    """A running world that was primed on a recording: actions in, pictures out. Knows nothing of windows."""

    def __init__(self, dream: Dream, context: Recording):
        self.dream, self.context = dream, context
        self.reset()

    def reset(self) -> None:
        """Back to the end of the recording, with the seed as at first."""
        prime(self.dream, self.context)
        self.picture = self.dream.pictures()[0].numpy()  # [H, W, 3] uint8
        self.action = np.zeros(ACTION_DIM, np.float32)  # that led to it
        self.seconds: deque[float] = deque(maxlen=100_000)  # that each step took

    def step(self, action: np.ndarray) -> np.ndarray:
        """Action [5] -> the next picture [H, W, 3] uint8."""
        began = time.perf_counter()
        self.dream.step(torch.from_numpy(action)[None])
        self.picture = self.dream.pictures()[0].numpy()
        self.action = action
        self.seconds.append(time.perf_counter() - began)
        return self.picture


class StepClock:
    """Lets a step pass `fps` times a second and never more often. Time that was lost is not made up for."""

    def __init__(
        self,
        fps: float,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.fps, self.now, self.sleep = fps, now, sleep
        self.restart()

    def restart(self) -> None:
        """Starts counting here; the first step is due in 1/fps seconds."""
        self.due = self.now() + 1 / self.fps
        self.passed: deque[float] = deque([self.now()], maxlen=round(2 * self.fps) + 1)

    def wait(self) -> None:
        """Sleeps until the next step is due."""
        while (early := self.due - self.now()) > 0:
            self.sleep(early)
        now = self.now()
        self.passed.append(now)
        # A step that was a little late does not delay the next, but two are never nearer than half a frame.
        self.due = max(self.due + 1 / self.fps, now + 0.5 / self.fps)

    @property
    def rate(self) -> float:
        """Steps a second over the last two seconds."""
        return (len(self.passed) - 1) / max(self.passed[-1] - self.passed[0], 1e-9)

    @property
    def too_slow(self) -> bool:
        """True if for two seconds the steps have come later than they should."""
        return len(self.passed) == self.passed.maxlen and self.rate < 0.95 * self.fps


class Window:
    """The pygame window: turns events into controls, lets the session step, shows what comes of it."""

    INK, DARK, LIT, WARN = (240, 240, 240), (30, 30, 30), (255, 190, 60), (255, 120, 90)
    VEIL = (*DARK, 170)  # behind what is written over the picture, so that it can be read on snow

    def __init__(
        self,
        session: Session,
        controls: Controls,
        clock: StepClock,
        scale: int | None = None,
        use_mouse: bool = True,
    ):
        """`scale` None takes the largest whole one that leaves some of the screen free. Raises
        pygame.error."""
        import pygame  # here, so that --help and headless play do without it

        self.pygame = pygame
        self.session, self.controls, self.clock, self.use_mouse = session, controls, clock, use_mouse
        self.captured = False
        self.fresh = True  # primed, and that picture not shown yet
        self.dreamt = False  # a frame was shown that the world made
        self.complained = False
        self.fonts: dict = {}
        self.keys = {
            pygame.K_w: "forward", pygame.K_s: "back", pygame.K_a: "left", pygame.K_d: "right",
            pygame.K_SPACE: "jump", pygame.K_LEFT: "look_left", pygame.K_RIGHT: "look_right",
            pygame.K_UP: "look_up", pygame.K_DOWN: "look_down",
        }  # fmt: skip
        # Not pygame.init(): it would start the sound system too, which may be missing.
        pygame.display.init()
        pygame.font.init()
        height, width = session.picture.shape[:2]
        if scale is None:
            screen_width, screen_height = pygame.display.get_desktop_sizes()[0]
            scale = max(1, int(SCREEN_SHARE * min(screen_width / width, screen_height / height)))
        pygame.display.set_caption(TITLE)
        pygame.display.set_mode((width * scale, height * scale), pygame.RESIZABLE)

    def run(self) -> None:
        """Plays until the player quits; leaves nothing of pygame behind."""
        try:
            self.clock.restart()
            while self.tick():
                pass
        finally:
            self.close()

    def close(self) -> None:
        self.capture(False)
        self.pygame.font.quit()
        self.pygame.display.quit()

    def tick(self) -> bool:
        """Shows the world's next step (after a reset: its start) when it is due; False once the player quits.

        Events are read after the wait, so that what is pressed acts on the very next frame.
        """
        self.clock.wait()
        if not all(self.handle(event) for event in self.pygame.event.get()):
            return False
        if self.fresh:
            self.fresh = False
        else:
            self.session.step(self.controls.take_action())
        if self.clock.too_slow and not self.complained:
            self.complained = True
            print(f"too slow for {self.clock.fps:g} steps/s: this machine makes {self.clock.rate:.1f}")
        self.draw()
        if self.session.seconds and not self.dreamt:
            self.dreamt = True
            say_first_frame()
        return True

    def handle(self, event) -> bool:
        """Takes in one pygame event; False if it asks to quit."""
        pg = self.pygame
        if event.type == pg.QUIT:
            return False
        if event.type == pg.KEYDOWN:
            if event.key == pg.K_ESCAPE:
                if not self.captured:
                    return False
                self.capture(False)
            elif event.key == pg.K_r:
                self.session.reset()
                self.clock.restart()
                self.fresh = True
            elif event.key in self.keys:
                self.controls.press(self.keys[event.key])
        elif event.type == pg.KEYUP and event.key in self.keys:
            self.controls.release(self.keys[event.key])
        elif event.type == pg.MOUSEBUTTONDOWN and event.button == 1 and self.use_mouse:
            self.capture(True)
        elif event.type == pg.MOUSEMOTION and self.captured:
            self.controls.look(*event.rel)
        elif event.type == pg.WINDOWFOCUSLOST:
            self.controls.let_go()
            self.capture(False)
        return True

    def capture(self, on: bool) -> None:
        """Takes the mouse for looking around (hidden, kept in the window), or lets go of it."""
        if on == self.captured:
            return
        self.captured = on
        self.controls.stop_turning()
        self.pygame.event.set_grab(on)
        self.pygame.mouse.set_visible(not on)
        # pygame-ce; in pygame a grabbed and hidden mouse is relative of itself.
        if hasattr(self.pygame.mouse, "set_relative_mode"):
            self.pygame.mouse.set_relative_mode(on)

    def draw(self) -> None:
        """Shows the picture, each of its pixels as a square of whole pixels, and the controls over it."""
        pg, screen = self.pygame, self.pygame.display.get_surface()  # another one after a change of size
        height, width = self.session.picture.shape[:2]
        scale = max(1, min(screen.get_width() // width, screen.get_height() // height))
        frame = pg.image.frombuffer(self.session.picture.tobytes(), (width, height), "RGB")
        area = pg.Rect(0, 0, width * scale, height * scale)
        area.center = screen.get_rect().center
        screen.fill((0, 0, 0))
        screen.blit(pg.transform.scale(frame, area.size), area)
        self.draw_controls(screen, area)
        pg.display.flip()

    def draw_controls(self, screen, area) -> None:
        """Keys light up while they act on the world; the pad beside them shows how the view turns."""
        pg, action = self.pygame, self.session.action
        unit = max(14, area.height // 22)  # the side of a key
        gap = max(2, unit // 8)
        pitch = unit + gap
        area = area.inflate(-2 * gap, -2 * gap)
        panel = pg.Surface((6 * pitch, 3 * pitch - gap), pg.SRCALPHA)
        move_x, move_z, jump = action[2:]
        caps = [
            ("W", 1, 0, 1, move_z > 0), ("A", 0, 1, 1, move_x < 0), ("S", 1, 1, 1, move_z < 0),
            ("D", 2, 1, 1, move_x > 0), ("SPACE", 0, 2, 3, jump > 0),
        ]  # fmt: skip
        for text, column, row, columns, lit in caps:
            cap = pg.Rect(column * pitch, row * pitch, columns * pitch - gap, unit)
            pg.draw.rect(panel, self.LIT if lit else self.VEIL, cap, border_radius=gap)
            ink = self.text(text, unit * 2 // 3, self.DARK if lit else self.INK)
            panel.blit(ink, ink.get_rect(center=cap.center))
        pad = pg.Rect(3 * pitch + gap, 0, 3 * pitch - gap, 3 * pitch - gap)
        pg.draw.rect(panel, self.VEIL, pad, border_radius=gap)
        reach = pad.width // 2 - unit // 4 - 1
        dot = (pad.centerx + round(reach * action[YAW]), pad.centery + round(reach * action[PITCH]))
        turning = bool(np.abs(action[[YAW, PITCH]]).max() > 1e-3)
        pg.draw.line(panel, self.LIT if turning else self.INK, pad.center, dot, max(2, gap // 2))
        pg.draw.circle(panel, self.LIT if turning else self.INK, dot, max(3, unit // 4))
        screen.blit(panel, panel.get_rect(bottomleft=area.bottomleft))

        size = unit * 2 // 3
        if self.clock.too_slow:
            rate, colour = (
                f"{self.clock.rate:.1f} of {self.clock.fps:g} fps: this machine is too slow",
                self.WARN,
            )
        else:
            rate, colour = f"{self.clock.rate:.1f} fps", self.INK
        ink = self.veiled(rate, size, colour)
        screen.blit(ink, ink.get_rect(topright=area.topright))

        if self.captured:
            hint = "Esc: free the mouse"
        else:
            look = "click: look with the mouse" if self.use_mouse else "arrows: look"
            hint = f"{look}   R: reset   Esc: quit"
        ink = self.veiled(hint, size, self.INK)
        screen.blit(ink, ink.get_rect(bottomright=area.bottomright))

    def text(self, text: str, size: int, colour: tuple[int, int, int]):
        """The text on a transparent surface."""
        if size not in self.fonts:
            self.fonts[size] = self.pygame.font.Font(None, round(size * 1.3))
        return self.fonts[size].render(text, True, colour)

    def veiled(self, text: str, size: int, colour: tuple[int, int, int]):
        """The text on a dark veil."""
        ink = self.text(text, size, colour)
        veil = self.pygame.Surface(
            (ink.get_width() + size, ink.get_height() + size // 2), self.pygame.SRCALPHA
        )
        self.pygame.draw.rect(veil, self.VEIL, veil.get_rect(), border_radius=size // 5)
        veil.blit(ink, ink.get_rect(center=veil.get_rect().center))
        return veil


def missing_display() -> str | None:
    """Why no window can be opened here; None if one can. SDL_VIDEODRIVER in the environment has the last
    word."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    chosen = os.environ.get("SDL_VIDEODRIVER")
    if sys.platform.startswith("linux") and not chosen:
        if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            return "neither DISPLAY nor WAYLAND_DISPLAY is set"
    try:
        import pygame
    except ImportError:
        return "pygame is not installed (pip install pygame-ce)"
    try:
        pygame.display.init()
    except pygame.error as error:
        return f"pygame: {error}"
    driver = pygame.display.get_driver()
    if not chosen and driver in ("dummy", "offscreen"):  # what SDL falls back to where no real one works
        pygame.display.quit()
        return f"pygame found only the {driver} driver"
    return None


def age() -> float:
    """Seconds since this process was created."""
    stat = Path("/proc/self/stat")
    if stat.is_file():  # Linux, where psutil counts from the boot, which it knows to a second only
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()


def say_first_frame() -> None:
    """How long it took from the start of the process to the first dreamt picture."""
    tqdm.write(f"first frame after {age():.1f} s")


def play_script(session: Session, actions: np.ndarray, fps: float, scale: int, out: Path) -> None:
    """Plays actions [N, 5] without a window; writes a video of the N frames and a contact sheet, prints the
    speed."""
    frames = [session.picture]
    for action in tqdm(actions, desc="play", unit="step"):
        frames.append(session.step(action))
        if len(frames) == 2:
            say_first_frame()
    took = np.array(session.seconds)
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
    add("--fps", type=positive, help="steps a second, never more than the data has (default: as the data)")
    add(
        "--scale",
        type=count,
        help=f"pixels for one (default: what fits the screen; {VIDEO_SCALE} in a video)",
    )
    add("--no_mouse", action="store_true", help="leave the mouse alone; look with the arrow keys")
    add(
        "--mouse_sens",
        type=positive,
        default=MOUSE_SENS,
        help="degrees of turn for a pixel of mouse motion (default: %(default)s, as in Minecraft)",
    )
    add("--headless", action="store_true", help="no window: play a script into a video")
    add(
        "--script",
        "--actions",
        metavar="SCRIPT",
        help='what to play, e.g. "w*32,yaw+0.5*16" (default: a walk); implies --headless',
    )
    add("--frames", type=count, help="cut or repeat the script to so many frames; implies --headless")
    add("--out", type=Path, help=f"video to write, .mp4 or .webm (default: {OUT}); implies --headless")
    return parser


def run(args: argparse.Namespace) -> None:
    """Plays in a window, or without one; raises one of USER_ERRORS where the flags cannot be followed."""
    headless = args.headless or any(v is not None for v in (args.script, args.frames, args.out))
    script, out = parse(WALK if args.script is None else args.script), args.out or OUT
    check_ending(out)
    reason = None if headless else missing_display()
    world = load_world(args)
    context = load_recording(args, world, args.context_frames or None).first(args.context_frames)
    fps = world.fps
    if args.fps is not None:
        fps = min(args.fps, world.fps)
        if args.fps > fps:
            print(f"--fps {args.fps:g}: the world learned from {fps:g} frames/s and goes no faster")
    session = Session(dream_of(world, args), context)
    if not headless and reason is None:
        reason = play_in_window(args, world, session, fps)
        if reason is None:
            return
    if reason is not None:
        print(f"no display ({reason}): playing a scripted walk into {out}")
    play_script(session, fit(script, args.frames or len(script)), fps, args.scale or VIDEO_SCALE, out)


def play_in_window(args: argparse.Namespace, world: World, session: Session, fps: float) -> str | None:
    """Plays until the player quits; says why if the window cannot be opened."""
    import pygame

    controls = Controls(fps, world.degrees_per_unit, args.mouse_sens)
    try:
        window = Window(session, controls, StepClock(fps), args.scale, not args.no_mouse)
    except pygame.error as error:
        return f"pygame: {error}"
    window.run()
    return None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(run, build_parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
