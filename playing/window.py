"""The pygame window: turns events into controls and commands, steps the session, draws the result."""

import os
import sys
import time
from collections.abc import Callable

import numpy as np

from dataset.actions import PITCH, YAW
from playing.bindings import COMMANDS, CONTROLS, VIEW_COMMANDS, help_lines
from playing.controls import Controls, StepClock
from playing.overlay import overlay
from playing.session import Session

SCREEN_SHARE = 0.8  # largest share of the screen's width and height for a new window
MESSAGE_SECONDS = 2.5
TITLE = "Ochre"


def missing_display() -> str | None:
    """Why no window can be opened on this machine; None if one can. SDL_VIDEODRIVER overrides the check."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    # Otherwise Windows magnifies the window and blurs it.
    os.environ.setdefault("SDL_WINDOWS_DPI_AWARENESS", "permonitorv2")
    requested = os.environ.get("SDL_VIDEODRIVER")
    if sys.platform.startswith("linux") and not requested:
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
    if not requested and driver in ("dummy", "offscreen"):  # SDL's fallbacks without a working driver
        pygame.display.quit()
        return f"pygame found only the {driver} driver"
    return None


class Window:
    """Shows a session and controls it by keyboard and mouse."""

    TEXT, DARK, LIT, WARNING = (240, 240, 240), (30, 30, 30), (255, 190, 60), (255, 120, 90)
    VEIL = (*DARK, 170)  # background of texts on the picture, so that they can be read on snow

    def __init__(
        self,
        session: Session,
        controls: Controls,
        clock: StepClock,
        scale: int | None = None,
        use_mouse: bool = True,
        smooth: bool = False,
        on_first_frame: Callable[[], None] = lambda: None,
    ):
        """`scale` None: the largest whole one within SCREEN_SHARE. `smooth`: interpolate the picture to fill
        the window. `on_first_frame` is called once the first generated picture is shown.

        Raises pygame.error if the window cannot be opened.
        """
        import pygame  # here, so that --help and headless play work without it

        self.pygame = pygame
        self.session, self.controls, self.clock, self.use_mouse = session, controls, clock, use_mouse
        self.captured = self.fullscreen = False
        self.restarted = True  # the start picture is still to be shown
        self.on_first_frame: Callable[[], None] | None = on_first_frame
        self.warned = False  # that the machine is too slow
        self.shown = {"help": False, "stats": False, "overlay": False, "smooth": smooth}
        self.message, self.message_until = "", 0.0
        self.fonts: dict = {}
        self.control_keys = {getattr(pygame, f"K_{b.key}"): b.name for b in CONTROLS}
        self.command_keys = {getattr(pygame, f"K_{b.key}"): b.name for b in (*COMMANDS, *VIEW_COMMANDS)}
        # Not pygame.init(): it would also start the sound system, which may be missing.
        pygame.display.init()
        pygame.font.init()
        height, width = session.picture.shape[:2]
        if scale is None:
            screen_width, screen_height = pygame.display.get_desktop_sizes()[0]
            scale = max(1, int(SCREEN_SHARE * min(screen_width / width, screen_height / height)))
        self.size = width * scale, height * scale  # when not full screen
        pygame.display.set_caption(TITLE)
        pygame.display.set_mode(self.size, pygame.RESIZABLE)
        more = ", N: next start place" if len(session.start_places) > 1 else ""
        self.show_message(f"{session.name} - H: help{more}")

    def run(self) -> None:
        """Plays until the player quits, then closes the window."""
        try:
            self.clock.restart()
            while self.tick():
                pass
        finally:
            self.close()

    def close(self) -> None:
        """Closes the window and ends a recording of play."""
        if message := self.session.stop_recording():
            print(message)
        self.capture(False)
        self.pygame.font.quit()
        self.pygame.display.quit()

    # ------------------------------------------------------------ the loop

    def tick(self) -> bool:
        """Waits until a step is due, makes it and shows it; after a restart it shows the start picture.

        Returns False once the player quits. Events are handled after the wait, so that a key acts on the very
        next frame.
        """
        self.clock.wait()
        if not all(self.handle(event) for event in self.pygame.event.get()):
            return False
        step = not self.restarted and self.session.step_due
        if step:
            self.session.step(self.controls.take_action())
        if notice := self.session.take_notices():
            print(notice)
            self.show_message(notice)
        self.restarted = False
        if self.clock.too_slow and not self.warned:
            self.warned = True
            print(f"too slow for {self.clock.fps:g} steps/s: this machine makes {self.clock.rate:.1f}")
        self.draw()
        if step and self.on_first_frame is not None:
            self.on_first_frame()
            self.on_first_frame = None
        return True

    def handle(self, event) -> bool:
        """Handles a pygame event; returns False if it asks to quit."""
        pg = self.pygame
        if event.type == pg.QUIT:
            return False
        if event.type == pg.KEYDOWN:
            if event.key == pg.K_ESCAPE:
                if not self.captured:
                    return False
                self.capture(False)
            elif event.key in self.command_keys:
                self.command(self.command_keys[event.key])
            elif event.key in self.control_keys:
                self.controls.press(self.control_keys[event.key])
        elif event.type == pg.KEYUP and event.key in self.control_keys:
            self.controls.release(self.control_keys[event.key])
        elif event.type == pg.MOUSEBUTTONDOWN and event.button == 1 and self.use_mouse:
            self.capture(True)
        elif event.type == pg.MOUSEMOTION and self.captured:
            self.controls.look(*event.rel)
        elif event.type == pg.WINDOWFOCUSLOST:
            # Keys released without focus are not reported (on Windows not even Alt's own).
            self.controls.release_all()
            self.capture(False)
        return True

    def command(self, name: str) -> None:
        """Runs a command, one of bindings.COMMANDS or VIEW_COMMANDS."""
        if name in self.shown:
            self.shown[name] = not self.shown[name]
        elif name == "fullscreen":
            self.fullscreen = not self.fullscreen
            flags = self.pygame.FULLSCREEN if self.fullscreen else self.pygame.RESIZABLE
            self.pygame.display.set_mode((0, 0) if self.fullscreen else self.size, flags)
        elif name == "screenshot":
            screen = self.pygame.surfarray.array3d(self.pygame.display.get_surface())
            self.show_message(self.session.screenshot(screen.swapaxes(0, 1)))
        else:
            restarts = self.session.restarts
            self.show_message(self.session.command(name))
            if self.session.restarts > restarts:
                self.clock.restart()
                self.restarted = True

    def show_message(self, message: str) -> None:
        """Shows a message for MESSAGE_SECONDS."""
        self.message, self.message_until = message, time.monotonic() + MESSAGE_SECONDS

    def capture(self, on: bool) -> None:
        """Captures the mouse for looking around (hidden, confined to the window), or frees it."""
        if on == self.captured:
            return
        self.captured = on
        self.controls.stop_turning()
        self.pygame.event.set_grab(on)
        self.pygame.mouse.set_visible(not on)
        # pygame-ce only; in pygame a grabbed, hidden mouse is in relative mode already.
        if hasattr(self.pygame.mouse, "set_relative_mode"):
            self.pygame.mouse.set_relative_mode(on)

    # ------------------------------------------------------------ drawing

    def draw(self) -> None:
        """Draws the picture (while comparing: truth | generated) and everything over it."""
        pg, screen = self.pygame, self.pygame.display.get_surface()  # a new surface after a change of size
        session = self.session
        pictures = [session.picture] if session.truth is None else [session.truth, session.picture]
        whole = np.concatenate(pictures, 1)
        height, width = whole.shape[:2]
        fit = min(screen.get_width() / width, screen.get_height() / height)
        # Each pixel becomes a square of whole pixels, unless `smooth` is on.
        scale = fit if self.shown["smooth"] else max(1, int(fit))
        area = pg.Rect(0, 0, round(width * scale), round(height * scale))
        area.center = screen.get_rect().center
        enlarge = pg.transform.smoothscale if self.shown["smooth"] else pg.transform.scale
        screen.fill((0, 0, 0))
        screen.blit(enlarge(self.surface(whole), area.size), area)

        unit = max(14, screen.get_height() // 24)  # the side of a key
        gap = max(2, unit // 8)
        border = screen.get_rect().inflate(-2 * gap, -2 * gap)
        border = area.clip(border).inflate(-2 * gap, -2 * gap) if len(pictures) == 1 else border
        self.draw_controls(screen, border, unit, gap)
        self.draw_texts(screen, border, area, unit * 2 // 3)
        pg.display.flip()

    def surface(self, picture: np.ndarray):
        """[H, W, 3] uint8 as a pygame surface."""
        return self.pygame.image.frombuffer(picture.tobytes(), picture.shape[1::-1], "RGB")

    def draw_controls(self, screen, border, unit: int, gap: int) -> None:
        """Draws the keys, lit while they act, and a pad that shows how the view turns."""
        pg, action = self.pygame, self.session.action
        pitch = unit + gap
        panel = pg.Surface((6 * pitch, 3 * pitch - gap), pg.SRCALPHA)
        move_x, move_z, jump = action[2:]
        caps = [
            ("W", 1, 0, 1, move_z > 0), ("A", 0, 1, 1, move_x < 0), ("S", 1, 1, 1, move_z < 0),
            ("D", 2, 1, 1, move_x > 0), ("SPACE", 0, 2, 3, jump > 0),
        ]  # fmt: skip
        for text, column, row, columns, lit in caps:
            cap = pg.Rect(column * pitch, row * pitch, columns * pitch - gap, unit)
            pg.draw.rect(panel, self.LIT if lit else self.VEIL, cap, border_radius=gap)
            rendered = self.text(text, unit * 2 // 3, self.DARK if lit else self.TEXT)
            panel.blit(rendered, rendered.get_rect(center=cap.center))
        pad = pg.Rect(3 * pitch + gap, 0, 3 * pitch - gap, 3 * pitch - gap)
        pg.draw.rect(panel, self.VEIL, pad, border_radius=gap)
        reach = pad.width // 2 - unit // 4 - 1
        dot = (pad.centerx + round(reach * action[YAW]), pad.centery + round(reach * action[PITCH]))
        turning = bool(np.abs(action[[YAW, PITCH]]).max() > 1e-3)
        pg.draw.line(panel, self.LIT if turning else self.TEXT, pad.center, dot, max(2, gap // 2))
        pg.draw.circle(panel, self.LIT if turning else self.TEXT, dot, max(3, unit // 4))
        screen.blit(panel, panel.get_rect(bottomleft=border.bottomleft))

    def draw_texts(self, screen, border, area, size: int) -> None:
        """Draws the frame rate, a hint, the message, and what F3, F4 and H switch on."""
        rate, colour = f"{self.clock.rate:.1f} fps", self.TEXT
        if self.clock.too_slow:
            rate += f" of {self.clock.fps:g}: this machine is too slow"
            colour = self.WARNING
        marks = [self.session.paused and "PAUSED", self.session.recorder is not None and "REC"]
        self.veiled(screen, ["  ".join([*filter(None, marks), rate])], size, colour, topright=border.topright)

        if self.captured:
            hint = "Esc: free the mouse"
        else:
            look = "click: look with the mouse" if self.use_mouse else "arrows: look"
            hint = f"{look}   H: help   Esc: quit"
        self.veiled(screen, [hint], size, self.TEXT, bottomright=border.bottomright)

        if self.session.truth is not None:
            for text, x in (("truth", area.left), ("generated", area.centerx)):
                self.veiled(screen, [text], size, self.TEXT, bottomleft=(x, max(area.top, 2 * size)))
        lines = []
        if time.monotonic() < self.message_until:
            lines.append(self.message)
        if self.shown["stats"]:
            lines += stats_lines(self.session.stats(), self.clock)
        if self.shown["help"]:
            lines += help_lines("free the mouse, quit")
        if lines:
            self.veiled(screen, lines, size, self.TEXT, topleft=border.topleft)
        if self.shown["overlay"]:
            picture = overlay(self.session)
            if picture is None:
                reason = ["no overlay: no step yet, or a model without keyframes"]
                self.veiled(screen, reason, size, self.TEXT, midright=border.midright)
            else:
                scale = max(1, int(0.6 * screen.get_height() / picture.shape[0]))
                panel = self.pygame.transform.scale_by(self.surface(picture), scale)
                screen.blit(panel, panel.get_rect(midright=border.midright))

    def text(self, text: str, size: int, colour: tuple[int, int, int]):
        """The text on a transparent surface."""
        if size not in self.fonts:
            self.fonts[size] = self.pygame.font.Font(None, round(size * 1.3))
        return self.fonts[size].render(text, True, colour)

    def veiled(self, screen, lines: list[str], size: int, colour: tuple[int, int, int], **corner) -> None:
        """Writes lines on a dark veil; `corner` places it by an attribute of pygame's Rect."""
        rows = [self.text(line, size, colour) for line in lines]
        width, height = max(row.get_width() for row in rows), sum(row.get_height() for row in rows)
        veil = self.pygame.Surface((width + size, height + size // 2), self.pygame.SRCALPHA)
        self.pygame.draw.rect(veil, self.VEIL, veil.get_rect(), border_radius=size // 5)
        top = size // 4
        for row in rows:
            veil.blit(row, (size // 2, top))
            top += row.get_height()
        screen.blit(veil, veil.get_rect(**corner))


def stats_lines(stats: dict, clock: StepClock) -> list[str]:
    """`Session.stats` as lines of text."""
    position = ", ".join(f"{x:.1f}" for x in stats["position"])
    return [
        f"{clock.rate:.1f} of {clock.fps:g} steps/s, step {stats['step']}",
        f"{stats['step_ms']:.1f} ms: model {stats['model_ms']:.1f}, sampling {stats['sampling_ms']:.1f}, "
        f"decode {stats['decode_ms']:.1f}",
        f"{stats['sampling']}; {stats['unique_codes']} unique codes",
        f"position {position} m" if position else "position unknown to this model",
        f"yaw {stats['yaw']:.0f}, pitch {stats['pitch']:.0f} degrees",
    ]
