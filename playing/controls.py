"""From what the player holds and moves to the action of a step, and when the next step is due."""

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from dataset.actions import DEGREES_PER_UNIT, encode, from_keys

MOUSE_SENS = 0.15  # degrees a pixel, as in Minecraft at its default setting
ARROW_DEGREES_PER_SECOND = 90.0


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
