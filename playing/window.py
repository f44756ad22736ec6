"""The pygame window: events become controls and commands, the session steps, what comes of it is shown."""

import os
import sys
import time
from collections.abc import Callable

import numpy as np

from dataset.actions import PITCH, YAW
from playing.bindings import COMMANDS, CONTROLS, VIEW_COMMANDS, help_lines
from playing.controls import Controls, StepClock
from playing.overlay import beliefs
from playing.session import Session

SCREEN_SHARE = 0.8  # of the screen's sides that a new window may take
NOTE_SECONDS = 2.5  # that a message stays
TITLE = "Ochre"


def missing_display() -> str | None:
    """Why no window can be opened here; None if one can. SDL_VIDEODRIVER in the environment has the last
    word."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    # Else Windows enlarges the window by itself, blurring it.
    os.environ.setdefault("SDL_WINDOWS_DPI_AWARENESS", "permonitorv2")
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


class Window:
    """Shows a session and plays it by keyboard and mouse."""

    INK, DARK, LIT, WARN = (240, 240, 240), (30, 30, 30), (255, 190, 60), (255, 120, 90)
    VEIL = (*DARK, 170)  # behind what is written over the picture, so that it can be read on snow

    def __init__(
        self,
        session: Session,
        controls: Controls,
        clock: StepClock,
        scale: int | None = None,
        use_mouse: bool = True,
        smooth: bool = False,
        generated: Callable[[], None] = lambda: None,
    ):
        """`scale` None takes the largest whole one that leaves some of the screen free. `smooth` fills the
        window with a blurred picture instead of whole pixels. `generated` is called once the first generated
        picture is shown. Raises pygame.error."""
        import pygame  # here, so that --help and headless play do without it

        self.pygame = pygame
        self.session, self.controls, self.clock, self.use_mouse = session, controls, clock, use_mouse
        self.captured = self.fullscreen = False
        self.fresh = True  # primed, and that picture not shown yet
        self.on_first_rollout: Callable[[], None] | None = generated
        self.complained = False
        self.shown = {"help": False, "facts": False, "beliefs": False, "smooth": smooth}
        self.note, self.note_until = "", 0.0
        self.fonts: dict = {}
        self.held = {getattr(pygame, f"K_{b.key}"): b.does for b in CONTROLS}
        self.commands = {getattr(pygame, f"K_{b.key}"): b.does for b in (*COMMANDS, *VIEW_COMMANDS)}
        # Not pygame.init(): it would start the sound system too, which may be missing.
        pygame.display.init()
        pygame.font.init()
        height, width = session.picture.shape[:2]
        if scale is None:
            screen_width, screen_height = pygame.display.get_desktop_sizes()[0]
            scale = max(1, int(SCREEN_SHARE * min(screen_width / width, screen_height / height)))
        self.size = width * scale, height * scale  # of the window when it is not full screen
        pygame.display.set_caption(TITLE)
        pygame.display.set_mode(self.size, pygame.RESIZABLE)
        self.say(f"{session.name} - H: keys" + (", N: next place" if len(session.places) > 1 else ""))

    def run(self) -> None:
        """Plays until the player quits; leaves nothing of pygame behind."""
        try:
            self.clock.restart()
            while self.tick():
                pass
        finally:
            self.close()

    def close(self) -> None:
        """Ends the window, and the recording of play if one is being made."""
        if said := self.session.end_take():
            print(said)
        self.capture(False)
        self.pygame.font.quit()
        self.pygame.display.quit()

    # ------------------------------------------------------------ the loop

    def tick(self) -> bool:
        """Shows the world's next step (after a reset: its start) when it is due; False once the player quits.

        Events are read after the wait, so that what is pressed acts on the very next frame.
        """
        self.clock.wait()
        if not all(self.handle(event) for event in self.pygame.event.get()):
            return False
        stepped = not self.fresh and self.session.moves
        if stepped:
            self.session.step(self.controls.take_action())
        self.fresh = False
        if self.clock.too_slow and not self.complained:
            self.complained = True
            print(f"too slow for {self.clock.fps:g} steps/s: this machine makes {self.clock.rate:.1f}")
        self.draw()
        if stepped and self.on_first_rollout is not None:
            self.on_first_rollout()
            self.on_first_rollout = None
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
            elif event.key in self.commands:
                self.command(self.commands[event.key])
            elif event.key in self.held:
                self.controls.press(self.held[event.key])
        elif event.type == pg.KEYUP and event.key in self.held:
            self.controls.release(self.held[event.key])
        elif event.type == pg.MOUSEBUTTONDOWN and event.button == 1 and self.use_mouse:
            self.capture(True)
        elif event.type == pg.MOUSEMOTION and self.captured:
            self.controls.look(*event.rel)
        elif event.type == pg.WINDOWFOCUSLOST:
            # Keys that are let go elsewhere are never heard of (on Windows not even Alt's own).
            self.controls.let_go()
            self.capture(False)
        return True

    def command(self, name: str) -> None:
        """Does what a key of bindings.COMMANDS or VIEW_COMMANDS says."""
        if name in self.shown:
            self.shown[name] = not self.shown[name]
        elif name == "fullscreen":
            self.fullscreen = not self.fullscreen
            flags = self.pygame.FULLSCREEN if self.fullscreen else self.pygame.RESIZABLE
            self.pygame.display.set_mode((0, 0) if self.fullscreen else self.size, flags)
        elif name == "screenshot":
            screen = self.pygame.surfarray.array3d(self.pygame.display.get_surface())
            self.say(self.session.screenshot(screen.swapaxes(0, 1)))
        else:
            starts = self.session.starts
            self.say(self.session.command(name))
            if self.session.starts > starts:
                self.clock.restart()
                self.fresh = True

    def say(self, note: str) -> None:
        """Shows a message for some seconds."""
        self.note, self.note_until = note, time.monotonic() + NOTE_SECONDS

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

    # ------------------------------------------------------------ drawing

    def draw(self) -> None:
        """Shows the picture (comparing: truth | rollout) and what is written over it."""
        pg, screen = self.pygame, self.pygame.display.get_surface()  # another one after a change of size
        session = self.session
        pictures = [session.picture] if session.truth is None else [session.truth, session.picture]
        whole = np.concatenate(pictures, 1)
        height, width = whole.shape[:2]
        fit = min(screen.get_width() / width, screen.get_height() / height)
        # Each pixel a square of whole pixels, unless the smooth picture is asked for.
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
        self.draw_words(screen, border, area, unit * 2 // 3)
        pg.display.flip()

    def surface(self, picture: np.ndarray):
        """[H, W, 3] uint8 as a pygame surface."""
        return self.pygame.image.frombuffer(picture.tobytes(), picture.shape[1::-1], "RGB")

    def draw_controls(self, screen, border, unit: int, gap: int) -> None:
        """Keys light up while they act on the world; the pad beside them shows how the view turns."""
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
            ink = self.text(text, unit * 2 // 3, self.DARK if lit else self.INK)
            panel.blit(ink, ink.get_rect(center=cap.center))
        pad = pg.Rect(3 * pitch + gap, 0, 3 * pitch - gap, 3 * pitch - gap)
        pg.draw.rect(panel, self.VEIL, pad, border_radius=gap)
        reach = pad.width // 2 - unit // 4 - 1
        dot = (pad.centerx + round(reach * action[YAW]), pad.centery + round(reach * action[PITCH]))
        turning = bool(np.abs(action[[YAW, PITCH]]).max() > 1e-3)
        pg.draw.line(panel, self.LIT if turning else self.INK, pad.center, dot, max(2, gap // 2))
        pg.draw.circle(panel, self.LIT if turning else self.INK, dot, max(3, unit // 4))
        screen.blit(panel, panel.get_rect(bottomleft=border.bottomleft))

    def draw_words(self, screen, border, area, size: int) -> None:
        """The rate, a hint, messages, and what F3, F4 and H ask for."""
        rate, colour = f"{self.clock.rate:.1f} fps", self.INK
        if self.clock.too_slow:
            rate += f" of {self.clock.fps:g}: this machine is too slow"
            colour = self.WARN
        marks = [self.session.paused and "PAUSED", self.session.take is not None and "REC"]
        self.veiled(screen, ["  ".join([*filter(None, marks), rate])], size, colour, topright=border.topright)

        if self.captured:
            hint = "Esc: free the mouse"
        else:
            look = "click: look with the mouse" if self.use_mouse else "arrows: look"
            hint = f"{look}   H: keys   Esc: quit"
        self.veiled(screen, [hint], size, self.INK, bottomright=border.bottomright)

        if self.session.truth is not None:
            for text, x in (("recorded", area.left), ("generated", area.centerx)):
                self.veiled(screen, [text], size, self.INK, bottomleft=(x, max(area.top, 2 * size)))
        left = []
        if time.monotonic() < self.note_until:
            left.append(self.note)
        if self.shown["facts"]:
            left += fact_lines(self.session.facts(), self.clock)
        if self.shown["help"]:
            left += help_lines()
        if left:
            self.veiled(screen, left, size, self.INK, topleft=border.topleft)
        if self.shown["beliefs"]:
            picture = beliefs(self.session)
            if picture is None:
                note = ["no step yet, or a world without a memory"]
                self.veiled(screen, note, size, self.INK, midright=border.midright)
            else:
                scale = max(1, int(0.6 * screen.get_height() / picture.shape[0]))
                panel = self.pygame.transform.scale_by(self.surface(picture), scale)
                screen.blit(panel, panel.get_rect(midright=border.midright))

    def text(self, text: str, size: int, colour: tuple[int, int, int]):
        """The text on a transparent surface."""
        if size not in self.fonts:
            self.fonts[size] = self.pygame.font.Font(None, round(size * 1.3))
        return self.fonts[size].render(text, True, colour)

    def veiled(self, screen, lines: list[str], size: int, colour: tuple[int, int, int], **place) -> None:
        """Writes lines on a dark veil; `place` is a corner of it, as pygame's Rect names it."""
        inks = [self.text(line, size, colour) for line in lines]
        width, height = max(ink.get_width() for ink in inks), sum(ink.get_height() for ink in inks)
        veil = self.pygame.Surface((width + size, height + size // 2), self.pygame.SRCALPHA)
        self.pygame.draw.rect(veil, self.VEIL, veil.get_rect(), border_radius=size // 5)
        top = size // 4
        for ink in inks:
            veil.blit(ink, (size // 2, top))
            top += ink.get_height()
        screen.blit(veil, veil.get_rect(**place))


def fact_lines(facts: dict, clock: StepClock) -> list[str]:
    """`Session.facts` in words, a line each."""
    position = ", ".join(f"{x:.1f}" for x in facts["position"]) or "not kept by this world"
    return [
        f"{clock.rate:.1f} of {clock.fps:g} steps/s, step {facts['step']}",
        f"{facts['step_ms']:.1f} ms: model {facts['model_ms']:.1f}, sampling {facts['choice_ms']:.1f}, "
        f"decode {facts['decode_ms']:.1f}",
        f"{facts['chosen']}; {facts['unique_codes']} different codes",
        f"position {position}",
        f"yaw {facts['yaw']:.0f}, pitch {facts['pitch']:.0f} degrees",
    ]
