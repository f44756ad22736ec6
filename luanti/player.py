"""The scripted player: seeded, as often to the left as to the right, balanced over what a world must learn.

A player strings together short behaviours. Each is a generator of commands, one a frame; which comes next is
drawn by how far its share of the frames so far lies below SHARES. Walls and water interrupt a behaviour.
"""

import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dataset.actions import wrap

MAX_TURN = 15.0  # degrees a frame: an action of 1
MAX_PITCH = 70.0  # degrees from the horizon
# Shares of the frames. "turn", "look", "walk" and "strafe" are pure, so that each effect is seen alone; the
# two "away" kinds leave a view and come back to it, which is what a memory is measured on.
SHARES = {
    "still": 0.07,
    "turn": 0.15,
    "look": 0.07,
    "walk": 0.17,
    "strafe": 0.09,
    "jump": 0.07,
    "walk+turn": 0.22,
    "look away": 0.09,
    "walk away": 0.07,
}
# Frames that a walker may stand at a wall before something else is tried: some are worth learning from.
BLOCKED_FRAMES = 10
BLOCKED_SPEED = 0.08  # metres a frame; walking freely makes 0.25
WET_FRAMES = 6
ASHORE_FRAMES = 24  # dry feet for so long: more than a swimmer's bob out of the water


@dataclass(frozen=True)
class Command:
    """What the player does until the next frame: held keys, the camera's turn in degrees (+right, +down)."""

    keys: frozenset[str] = frozenset()
    yaw: float = 0.0
    pitch: float = 0.0


@dataclass(frozen=True)
class Senses:
    """What the player knows of the frame it sees: degrees, metres, and whether its feet are in water."""

    yaw: float
    pitch: float
    pos: tuple[float, float, float]
    wet: bool = False


Behaviour = Iterator[Command]
HORIZONTAL = {"forward", "back", "left", "right"}


class Player:
    """Call it with the Senses of each frame; it returns the Command until the next one."""

    def __init__(self, seed: int | str):
        self.random = random.Random(seed)
        self.spent = dict.fromkeys(SHARES, 0)  # frames for each kind
        self.kind = "still"
        self.behaviour: Behaviour = iter(())
        self.senses = Senses(0.0, 0.0, (0.0, 0.0, 0.0))
        self.places: deque[tuple[float, float]] = deque(maxlen=BLOCKED_FRAMES + 1)  # while keys move it
        self.wet = self.dry = 0  # frames with wet feet since it was ashore; frames in a row with dry feet
        self.shore: tuple[float, float] | None = None  # x, z where it was last ashore
        self.leaving_water = False
        self.escapes = 0  # tries in a row to get off a wall

    def __call__(self, senses: Senses) -> Command:
        self.senses = senses
        self._watch_out()
        command = next(self.behaviour, None)
        while command is None:
            self.kind = self._draw_kind()
            self.behaviour = getattr(self, "_" + self.kind.replace(" ", "_").replace("+", "_"))()
            command = next(self.behaviour, None)
        self.spent[self.kind] += 1
        if command.keys & HORIZONTAL:
            self.places.append((senses.pos[0], senses.pos[2]))
        else:
            self.places.clear()
        limit = MAX_PITCH - senses.pitch if command.pitch > 0 else -MAX_PITCH - senses.pitch
        pitch = command.pitch if abs(command.pitch) < abs(limit) else limit
        return Command(command.keys, _clip(command.yaw), _clip(pitch))

    def _draw_kind(self) -> str:
        total = sum(self.spent.values()) + 100  # so that the first draws are random, too
        lacking = [max(share * total - self.spent[kind], 0.0) for kind, share in SHARES.items()]
        return self.random.choices(list(SHARES), lacking)[0]

    # -------------------------------------------------------- walls and water

    def _watch_out(self) -> None:
        if self.senses.wet:
            self.wet += 1
            self.dry = 0
        else:
            self.dry += 1
        if self.dry >= ASHORE_FRAMES:
            self.wet = 0
            self.shore = self.senses.pos[0], self.senses.pos[2]
        if self.wet >= WET_FRAMES and not self.leaving_water:
            self.behaviour = self._leave_water()
        elif len(self.places) == self.places.maxlen:
            if sum(math.dist(a, b) for a, b in pairwise(self.places)) < BLOCKED_SPEED * BLOCKED_FRAMES:
                self.behaviour = self._leave_wall()
                self.escapes += 1
                self.places.clear()
                if self.leaving_water:  # a bank too high to climb: time to get away from it
                    self.leaving_water, self.wet = False, -ASHORE_FRAMES
            else:
                self.escapes = 0

    def _leave_wall(self) -> Behaviour:
        """Jumps up a step first; if that was no help, turns away, and walks on."""
        if self.escapes % 3 == 1:  # this try counts
            self.kind = "jump"
            yield from self._hold({"forward", "jump"}, self.random.randint(10, 18))
        else:
            self.kind = "walk+turn"
            yield from self._turn_by(self._sign() * self.random.uniform(50, 170), self._log_uniform(3, 12))
            yield from self._hold({"forward"}, self.random.randint(12, 30))

    def _leave_water(self) -> Behaviour:
        """Turns to where it was last ashore, or round, and swims there."""
        self.kind, self.leaving_water = "walk+turn", True
        keys = {"forward", "jump"}
        turn = 180.0 * self._sign()
        if self.shore is not None:
            x, _, z = self.senses.pos
            there = math.degrees(math.atan2(x - self.shore[0], self.shore[1] - z))
            turn = wrap(there - self.senses.yaw)
        yield from self._turn_by(turn, self._log_uniform(5, 12), keys)
        yield from self._hold(keys, self.random.randint(24, 48))
        self.wet, self.leaving_water = 0, False  # if its feet are wet still, it tries again

    # -------------------------------------------------------- building blocks

    def _sign(self) -> int:
        return self.random.choice((-1, 1))

    def _log_uniform(self, low: float, high: float) -> float:
        return math.exp(self.random.uniform(math.log(low), math.log(high)))

    def _hold(self, keys: set[str], frames: int) -> Behaviour:
        for _ in range(frames):
            yield Command(frozenset(keys))

    def _turn_by(self, yaw: float, speed: float, keys: set[str] = frozenset()) -> Behaviour:
        """Turns by `yaw` degrees at `speed` a frame, the last frame a shorter one."""
        while abs(yaw) > 1e-6:
            step = math.copysign(min(abs(yaw), speed), yaw)
            yaw -= step
            yield Command(frozenset(keys), yaw=step)

    def _pitch_to(self, goal: float, speed: float, keys: set[str] = frozenset()) -> Behaviour:
        uneven = self.random.random() < 0.6
        for _ in range(200):
            missing = goal - self.senses.pitch
            if abs(missing) < 0.3:  # about one pixel of the mouse
                return
            step = speed * self.random.uniform(0.2, 1.0) if uneven else speed
            yield Command(frozenset(keys), pitch=math.copysign(min(abs(missing), step), missing))

    def _yaw_rates(self, frames: int) -> list[float]:
        """Degrees a frame of one turn: held, swinging up and down like a hand, uneven, or to and fro."""
        shape = self.random.choice(("held", "swing", "uneven", "to and fro"))
        peak = self._sign() * self._log_uniform(0.7, MAX_TURN)
        if shape == "held":
            return [peak] * frames
        if shape == "uneven":
            return [peak * self.random.uniform(0.1, 1.0) for _ in range(frames)]
        turn = math.pi if shape == "swing" else 2 * math.pi
        wave = np.sin(turn * (np.arange(frames) + 0.5) / frames)
        return (peak * np.sign(wave) * wave**2).tolist()

    def _level(self) -> float:
        """A pitch to look along the ground at."""
        return self.random.gauss(2, 9)

    def _direction(self) -> set[str]:
        along, across = (
            self.random.choice(("forward",) * 3 + ("back",)),
            self.random.choice(("left", "right")),
        )
        return self.random.choices(({along}, {across}, {along, across}), (6, 2, 2))[0]

    # -------------------------------------------------------- the kinds

    def _still(self) -> Behaviour:
        yield from self._hold(set(), self.random.randint(4, 24))

    def _turn(self) -> Behaviour:
        for rate in self._yaw_rates(self.random.randint(6, 32)):
            yield Command(yaw=rate)

    def _look(self) -> Behaviour:
        """Up or down, and back to the horizon."""
        goal = self._sign() * self.random.triangular(5, 60, 15)
        yield from self._pitch_to(goal, self._log_uniform(0.5, 12))
        yield from self._hold(set(), self.random.randint(0, 6))
        yield from self._pitch_to(self._level(), self._log_uniform(1, 12))

    def _walk(self) -> Behaviour:
        yield from self._hold({self.random.choice(("forward",) * 3 + ("back",))}, self.random.randint(8, 48))

    def _strafe(self) -> Behaviour:
        keys = {self.random.choice(("left", "right"))}
        if self.random.random() < 0.35:
            keys.add(self.random.choice(("forward", "back")))
        yield from self._hold(keys, self.random.randint(6, 28))

    def _jump(self) -> Behaviour:
        keys = {"jump"} | self.random.choice((set(), {"forward"}, {"forward"}, self._direction()))
        frames = self.random.randint(4, 26)
        turning = self.random.random() < 0.3
        for rate in self._yaw_rates(frames) if turning else [0.0] * frames:
            yield Command(frozenset(keys), yaw=rate)

    def _walk_turn(self) -> Behaviour:
        keys = self._direction()
        frames = self.random.randint(8, 48)
        goal = self._level() if self.random.random() < 0.4 else self.senses.pitch
        speed = self._log_uniform(0.4, 4)
        hop = self.random.randrange(frames) if self.random.random() < 0.25 else -1
        for k, rate in enumerate(self._yaw_rates(frames)):
            missing = goal - self.senses.pitch
            pitch = math.copysign(min(abs(missing), speed), missing) if abs(missing) > 0.3 else 0.0
            jumping = {"jump"} if hop >= 0 and k in range(hop, hop + 4) else set()
            yield Command(frozenset(keys | jumping), yaw=rate, pitch=pitch)

    def _look_away(self) -> Behaviour:
        """Turns away, waits, and turns back to where it looked."""
        angle = self._sign() * self.random.choice((30, 60, 90, 180)) * self.random.uniform(0.85, 1.15)
        start = self.senses.yaw
        yield from self._hold(set(), self.random.randint(1, 4))
        yield from self._turn_by(angle, self._log_uniform(3, 14))
        yield from self._hold(set(), self.random.randint(0, 16))
        yield from self._turn_by(start - self.senses.yaw, self._log_uniform(3, 14))
        yield from self._hold(set(), self.random.randint(2, 6))

    def _walk_away(self) -> Behaviour:
        """Walks off and comes back, backwards or turned round, and looks where it looked."""
        frames = self.random.randint(12, 40)
        start = self.senses.yaw
        if self.random.random() < 0.5:
            out, back = self.random.choice(
                (("forward", "back"), ("back", "forward"), ("left", "right"), ("right", "left"))
            )
            yield from self._hold({out}, frames)
            yield from self._hold(set(), self.random.randint(0, 4))
            yield from self._hold({back}, frames)
        else:
            speed = self._log_uniform(5, 14)
            yield from self._hold({"forward"}, frames)
            yield from self._turn_by(180.0 * self._sign(), speed)
            yield from self._hold({"forward"}, frames)
            yield from self._turn_by(wrap(start - self.senses.yaw), speed)
        yield from self._hold(set(), self.random.randint(2, 6))


def _clip(turn: float) -> float:
    return max(-MAX_TURN, min(MAX_TURN, turn))
