"""Turns pressed keys and mouse motion into the action of a step, and paces the steps."""

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from dataset.actions import DEGREES_PER_UNIT, encode, from_keys

MOUSE_SENS = 0.15  # degrees per pixel, as in Minecraft at its default setting
ARROW_DEGREES_PER_SECOND = 90.0


class Controls:
    """The pressed controls and the pending mouse motion, from which it makes actions.

    Controls are forward, back, left, right, jump, look_left, look_right, look_up and look_down.
    """

    # A turn faster than the fastest in the data is spread over the next steps, so that a pixel of mouse
    # motion always turns as far. It is limited to this many steps: the view must stop soon after the mouse.
    MAX_PENDING_STEPS = 4

    def __init__(
        self, fps: float, degrees_per_unit: float = DEGREES_PER_UNIT, degrees_per_pixel: float = MOUSE_SENS
    ):
        self.fps, self.degrees_per_unit, self.degrees_per_pixel = fps, degrees_per_unit, degrees_per_pixel
        self.pressed: set[str] = set()
        self.tapped: set[str] = set()  # pressed since the last step, even if released since
        self.pending_turn = np.zeros(2)  # degrees of [yaw, pitch] that no step has made yet

    def press(self, control: str) -> None:
        self.pressed.add(control)
        self.tapped.add(control)

    def release(self, control: str) -> None:
        self.pressed.discard(control)

    def look(self, right: float, down: float) -> None:
        """Adds mouse motion in pixels."""
        limit = self.MAX_PENDING_STEPS * self.degrees_per_unit
        turn = np.array([right, down]) * self.degrees_per_pixel
        self.pending_turn = np.clip(self.pending_turn + turn, -limit, limit)

    def stop_turning(self) -> None:
        """Drops the pending mouse motion."""
        self.pending_turn = np.zeros(2)

    def release_all(self) -> None:
        """Releases all controls and drops the mouse motion: without focus no key release is reported."""
        self.pressed.clear()
        self.tapped.clear()
        self.stop_turning()

    def take_action(self) -> np.ndarray:
        """The action of this step [5]. Taps and mouse motion are used up by it."""
        active = self.pressed | self.tapped
        self.tapped.clear()
        # The data has no turn of more than one unit per frame; the rest is left for the next step.
        turn = np.clip(self.pending_turn, -self.degrees_per_unit, self.degrees_per_unit)
        self.pending_turn = self.pending_turn - turn
        arrows = np.array(
            [
                ("look_right" in active) - ("look_left" in active),
                ("look_down" in active) - ("look_up" in active),
            ]
        )
        yaw, pitch = turn + arrows * (ARROW_DEGREES_PER_SECOND / self.fps)
        return encode(yaw, pitch, *from_keys(active), degrees_per_unit=self.degrees_per_unit)


class StepClock:
    """Waits until each step is due: at most `fps` steps per second. Lost time is not made up for."""

    def __init__(
        self,
        fps: float,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.fps, self.now, self.sleep = fps, now, sleep
        self.restart()

    def restart(self) -> None:
        """Starts the measurement of the rate anew; the next step is due in 1/fps seconds."""
        self.due = self.now() + 1 / self.fps
        self.step_times: deque[float] = deque([self.now()], maxlen=round(2 * self.fps) + 1)

    def wait(self) -> None:
        """Sleeps until the next step is due."""
        while (early := self.due - self.now()) > 0:
            self.sleep(early)
        now = self.now()
        self.step_times.append(now)
        # A step that is a little late does not delay the next one, but steps are at least half a frame apart.
        self.due = max(self.due + 1 / self.fps, now + 0.5 / self.fps)

    @property
    def rate(self) -> float:
        """Steps per second over the last two seconds."""
        return (len(self.step_times) - 1) / max(self.step_times[-1] - self.step_times[0], 1e-9)

    @property
    def too_slow(self) -> bool:
        """True if the rate has been below 95% of `fps` over the last two seconds."""
        return len(self.step_times) == self.step_times.maxlen and self.rate < 0.95 * self.fps
