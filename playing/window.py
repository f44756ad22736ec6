"""The pygame window: turns events into controls and commands, steps the session, draws the result."""

import os
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dataset.actions import PITCH, YAW
from playing.bindings import COMMANDS, CONTROLS, VIEW_COMMANDS, help_lines
from playing.controls import Controls, StepClock
from playing.overlay import overlay
from playing.session import Session
from playing.start_screen import DROP_HINT, KEY_HINT, StartScreen

SCREEN_SHARE = 0.8  # largest share of the screen's width and height for a new window
MESSAGE_SECONDS, NAME_SECONDS = 2.5, 3.0  # that a message and the name of a start place are shown
OVERLAY_SHARE = 0.7  # of the height of the screen, for F4
INSET_SHARE = 0.3  # of the width of the picture, for the recording beside it
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
        choose: bool = False,
        dropped_frames: int | None = None,
    ):
        """`scale` None: the largest whole one within SCREEN_SHARE. `smooth`: interpolate the picture to fill
        the window. `on_first_frame` is called once the first generated picture is shown. `choose`: begin with
        the start screen. Of a clip dropped on the window at most `dropped_frames` are read.

        Raises pygame.error if the window cannot be opened.
        """
        import pygame  # here, so that --help and headless play work without it

        self.pygame = pygame
        self.session, self.controls, self.clock, self.use_mouse = session, controls, clock, use_mouse
        self.start_screen, self.dropped_frames = StartScreen(session, choose), dropped_frames
        self.columns = 1  # of the start screen, as drawn last
        self.places: list = []  # the rectangle of each place on the start screen, as drawn last
        self.captured = self.fullscreen = False
        self.restarted = True  # the start picture is still to be shown
        self.on_first_frame: Callable[[], None] | None = on_first_frame
        self.warned = False  # that the machine is too slow
        self.shown = {"help": False, "stats": False, "overlay": False, "smooth": smooth}
        self.message, self.message_until, self.name_until = "", 0.0, 0.0
        self.fonts: dict = {}
        self.modifiers = {
            getattr(pygame, f"K_{side}{key}") for side in "LR" for key in ("SHIFT", "CTRL", "ALT")
        }
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
        self.show_message(f"H: help{more}")
        self.show_name()

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

        On the start screen it turns one of the places instead.

        Returns False once the player quits. Events are handled after the wait, so that a key acts on the very
        next frame.
        """
        self.clock.wait()
        if not all(self.handle(event) for event in self.pygame.event.get()):
            return False
        choosing = self.start_screen.is_open
        step = not self.restarted and self.session.step_due and not choosing
        if step:
            self.session.step(self.controls.take_action())
        elif choosing:
            turned = self.start_screen.advance() is not None
        if notice := self.session.take_notices():
            print(notice)
            self.show_message(notice)
        self.restarted = False
        if self.too_slow and not self.warned:
            self.warned = True
            print(f"too slow for {self.clock.fps:g} steps/s: this machine makes {self.clock.rate:.1f}")
        self.draw()
        if (step or choosing and turned) and self.on_first_frame is not None:
            self.on_first_frame()
            self.on_first_frame = None
        return True

    @property
    def too_slow(self) -> bool:
        """Whether the machine does not keep up with the world. A world that waits cannot be late."""
        return self.clock.too_slow and not self.session.paused and not self.start_screen.is_open

    def handle(self, event) -> bool:
        """Handles a pygame event; returns False if it asks to quit."""
        pg = self.pygame
        if event.type == pg.QUIT:
            return False
        if event.type == pg.DROPFILE:
            self.start(lambda: self.start_screen.add(Path(event.file), self.dropped_frames))
        elif self.start_screen.is_open and event.type in (pg.KEYDOWN, pg.MOUSEMOTION, pg.MOUSEBUTTONDOWN):
            return self.handle_choice(event)
        elif event.type == pg.KEYDOWN:
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

    def handle_choice(self, event) -> bool:
        """Handles a key or the mouse on the start screen; returns False if it asks to quit."""
        pg, screen = self.pygame, self.start_screen
        if event.type != pg.KEYDOWN:
            hit = next((n for n, place in enumerate(self.places) if place.collidepoint(event.pos)), None)
            if hit is not None and event.type == pg.MOUSEMOTION:
                screen.select(hit)
            elif hit is not None and event.button == 1:
                self.start(lambda: screen.choose(hit))
            return True
        steps = {pg.K_LEFT: -1, pg.K_RIGHT: 1, pg.K_n: 1, pg.K_UP: -self.columns, pg.K_DOWN: self.columns}
        if event.key == pg.K_ESCAPE:
            if not screen.began:
                return False
            screen.close()
            self.clock.restart()
        elif event.key in steps:
            screen.select(screen.selected + steps[event.key])
        elif pg.K_1 <= event.key <= pg.K_9:
            self.start(lambda: screen.choose(event.key - pg.K_1))
        elif self.command_keys.get(event.key) in ("fullscreen", "screenshot"):
            self.command(self.command_keys[event.key])
        elif event.key not in self.modifiers:
            self.start(lambda: screen.choose(screen.selected))
        return True

    def start(self, choice: Callable[[], str]) -> None:
        """Lets the player choose a start place by a method of the start screen; shows its message."""
        restarts = self.session.restarts
        self.show_message(choice())
        if self.session.restarts > restarts:
            self.after_restart()

    def after_restart(self) -> None:
        """The start picture comes next, under the name of the place."""
        self.clock.restart()
        self.restarted = True
        self.show_name()

    def command(self, name: str) -> None:
        """Runs a command, one of bindings.COMMANDS or VIEW_COMMANDS."""
        if name == "places":
            self.capture(False)
            self.controls.release_all()
            self.start_screen.open()
        elif name in self.shown:
            self.shown[name] = not self.shown[name]
        elif name == "fullscreen":
            self.fullscreen = not self.fullscreen
            flags = self.pygame.FULLSCREEN if self.fullscreen else self.pygame.RESIZABLE
            self.pygame.display.set_mode((0, 0) if self.fullscreen else self.size, flags)
        elif name == "screenshot":
            screen = self.pygame.surfarray.array3d(self.pygame.display.get_surface())
            self.show_message(self.session.screenshot(screen.swapaxes(0, 1)))
        else:
            self.start(lambda: self.session.command(name))
            if name == "pause":
                self.clock.restart()  # the pause does not count as slow

    def show_name(self) -> None:
        """Shows the name of the start place for NAME_SECONDS."""
        self.name_until = time.monotonic() + NAME_SECONDS

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
        """Draws the start screen, or the picture and all that is over it."""
        screen = self.pygame.display.get_surface()  # a new one after a change of size
        screen.fill((0, 0, 0))
        if self.start_screen.is_open:
            self.draw_start_screen(screen)
        else:
            self.draw_world(screen)
        self.pygame.display.flip()

    def draw_world(self, screen) -> None:
        """Draws the picture (while comparing: truth | generated) and everything over it."""
        pg, session = self.pygame, self.session
        beside = session.truth is not None and not session.inset
        whole = np.concatenate([session.truth, session.picture], 1) if beside else session.picture
        height, width = whole.shape[:2]
        fit = min(screen.get_width() / width, screen.get_height() / height)
        # Each pixel becomes a square of whole pixels, unless `smooth` is on.
        scale = fit if self.shown["smooth"] else max(1, int(fit))
        area = pg.Rect(0, 0, round(width * scale), round(height * scale))
        area.center = screen.get_rect().center
        enlarge = pg.transform.smoothscale if self.shown["smooth"] else pg.transform.scale
        screen.blit(enlarge(self.surface(whole), area.size), area)

        unit = max(14, screen.get_height() // 24)  # the side of a key
        gap = max(2, unit // 8)
        border = screen.get_rect().inflate(-2 * gap, -2 * gap)
        border = border if beside else area.clip(border).inflate(-2 * gap, -2 * gap)
        self.draw_controls(screen, border, unit, gap)
        self.draw_texts(screen, border, area, unit * 2 // 3, beside)

    def draw_start_screen(self, screen) -> None:
        """Draws the places, turning, under their numbers and names; a last cell is for dropped files."""
        pg, names, turns = self.pygame, self.start_screen.names, self.start_screen.turns
        size = max(12, screen.get_height() // 32)
        gap = size // 2
        title = self.text(TITLE, 2 * size, self.TEXT)
        screen.blit(title, title.get_rect(midtop=(screen.get_width() // 2, gap)))
        self.veiled(
            screen,
            [KEY_HINT],
            size,
            self.TEXT,
            midbottom=(screen.get_width() // 2, screen.get_height() - gap),
        )
        room = screen.get_rect().inflate(-4 * gap, 0)
        room.top, room.height = (
            title.get_height() + 2 * gap,
            screen.get_height() - title.get_height() - 3 * size - 3 * gap,
        )
        height, width = self.session.picture.shape[:2]
        cells, self.columns = cells_in(room, len(names) + 1, width / height, gap)
        cells = [pg.Rect(cell) for cell in cells]
        self.places = cells[:-1]
        for n, cell in enumerate(self.places):
            selected = n == self.start_screen.selected
            if n < len(turns):
                picture = self.surface(turns[n].picture(time.monotonic()))
                screen.blit(pg.transform.smoothscale(picture, cell.size), cell)
            pg.draw.rect(screen, self.LIT if selected else self.DARK, cell, max(2, gap // 3))
            number = f"{n + 1}  " if n < 9 else ""
            colour = self.LIT if selected else self.TEXT
            self.veiled(
                screen, [f"{number}{names[n]}"], size, colour, bottomleft=cell.inflate(-gap, -gap).bottomleft
            )
        pg.draw.rect(screen, (90, 90, 90), cells[-1], max(1, gap // 4), border_radius=gap)
        lines = textwrap.wrap(DROP_HINT, 14) if cells[-1].width < 20 * size else [DROP_HINT]
        self.veiled(screen, lines, size, self.TEXT, center=cells[-1].center)
        self.draw_message(screen, size, screen.get_height() - 3 * size)

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

    def draw_texts(self, screen, border, area, size: int, beside: bool) -> None:
        """Draws the frame rate, a hint, the message, and what F3, F4 and H switch on. `beside`: the recording
        is left of the generated picture."""
        session, gap = self.session, size // 3
        marks = [session.paused and "PAUSED", session.recorder is not None and "REC"]
        colour = self.TEXT
        if self.too_slow:
            marks.append(f"{self.clock.rate:.1f} fps of {self.clock.fps:g}: this machine is too slow")
            colour = self.WARNING
        elif not session.paused:
            marks.append(f"{self.clock.rate:.1f} fps")
        rate = self.veiled(screen, ["  ".join(filter(None, marks))], size, colour, topright=border.topright)

        if self.captured:
            hint = "Esc: free the mouse"
        else:
            look = "click: look with the mouse" if self.use_mouse else "arrows: look"
            hint = f"{look}   H: help   Esc: quit"
        bottom = self.veiled(screen, [hint], size, self.TEXT, bottomright=border.bottomright).top - gap

        # On the left the panel of F3 and H, below the labels or the inset, which are drawn over it.
        top, labels = border.top, max(area.top, 2 * size)
        if beside:
            top = labels + gap
        elif session.truth is not None:
            width = round(INSET_SHARE * area.width)
            inset = self.pygame.Rect(border.left, top, width, width * area.height // area.width)
            top = inset.bottom + gap
        lines = []
        if self.shown["stats"]:
            lines += stats_lines(session.stats(), self.clock)
        if self.shown["help"]:
            lines += help_lines("free the mouse, quit")
        if lines:
            self.veiled(screen, lines, size, self.TEXT, topleft=(border.left, top))
        if beside:
            self.veiled(screen, ["truth"], size, self.TEXT, bottomleft=(area.left, labels))
            self.veiled(screen, ["generated"], size, self.TEXT, bottomleft=(area.centerx, labels))
        elif session.truth is not None:
            screen.blit(self.pygame.transform.smoothscale(self.surface(session.truth), inset.size), inset)
            self.pygame.draw.rect(screen, self.TEXT, inset, max(1, gap // 3))
            self.veiled(screen, ["recording"], size * 3 // 4, self.TEXT, topleft=inset.topleft)

        # The overlay lies above the line of the message.
        message = bottom - 2 * size
        if self.shown["overlay"]:
            self.draw_overlay(screen, border, rate.bottom + gap, message - gap, size)
        if time.monotonic() < self.name_until:
            self.veiled(
                screen,
                [session.name],
                2 * size,
                self.TEXT,
                midtop=(area.centerx, area.top + area.height // 6),
            )
        self.draw_message(screen, size, bottom)

    def draw_overlay(self, screen, border, top: int, bottom: int, size: int) -> None:
        """Draws the overlay of F4 on the right, between two heights. The picture keeps its size."""
        picture = overlay(self.session)
        if picture is None:
            reason = ["no overlay: no step yet, or a model without keyframes"]
            self.veiled(screen, reason, size, self.TEXT, midright=border.midright)
            return
        height = min(OVERLAY_SHARE * screen.get_height(), bottom - top)
        scale = height / picture.shape[0]
        scale = max(int(scale), min(scale, 1.0))  # whole, or smaller
        panel = self.pygame.transform.smoothscale_by(self.surface(picture), scale)
        screen.blit(panel, panel.get_rect(midright=(border.right, (top + bottom) // 2)))

    def draw_message(self, screen, size: int, bottom: int) -> None:
        """Draws the message, while there is one, in the middle above a height."""
        if time.monotonic() < self.message_until:
            lines = textwrap.wrap(self.message, max(20, screen.get_width() // size)) or [""]
            self.veiled(screen, lines, size, self.TEXT, midbottom=(screen.get_width() // 2, bottom))

    def text(self, text: str, size: int, colour: tuple[int, int, int]):
        """The text on a transparent surface."""
        if size not in self.fonts:
            self.fonts[size] = self.pygame.font.Font(None, round(size * 1.3))
        return self.fonts[size].render(text, True, colour)

    def veiled(self, screen, lines: list[str], size: int, colour: tuple[int, int, int], **corner):
        """Writes lines on a dark veil -> its rectangle; `corner` places it by an attribute of pygame's
        Rect."""
        rows = [self.text(line, size, colour) for line in lines]
        width, height = max(row.get_width() for row in rows), sum(row.get_height() for row in rows)
        veil = self.pygame.Surface((width + size, height + size // 2), self.pygame.SRCALPHA)
        self.pygame.draw.rect(veil, self.VEIL, veil.get_rect(), border_radius=size // 5)
        top = size // 4
        for row in rows:
            veil.blit(row, (size // 2, top))
            top += row.get_height()
        return screen.blit(veil, veil.get_rect(**corner).clamp(screen.get_rect()))


def cells_in(
    room: tuple[int, int, int, int], count: int, aspect: float, gap: int
) -> tuple[list[tuple[int, int, int, int]], int]:
    """As large cells of one aspect ratio (width / height) as fit into a room (left, top, width, height).

    Returns their rectangles, row by row, and the number of columns.
    """
    left, top, width, height = room

    def cell_width(columns: int) -> int:
        rows = -(-count // columns)
        return int(min((width + gap) / columns - gap, ((height + gap) / rows - gap) * aspect))

    columns = max(range(1, count + 1), key=cell_width)
    w = max(8, cell_width(columns))
    h, rows = round(w / aspect), -(-count // columns)
    x = left + (width - columns * (w + gap) + gap) // 2
    y = top + (height - rows * (h + gap) + gap) // 2
    return [(x + n % columns * (w + gap), y + n // columns * (h + gap), w, h) for n in range(count)], columns


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
