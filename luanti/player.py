"""The scripted player: seeded, as often to the left as to the right, balanced over what a world must learn.

A player strings together short behaviours. Each is a generator of commands, one a frame; which comes next is
drawn by how far its share of the frames so far lies below the style's. Walls and water interrupt a behaviour.
A clip's seed chooses one of STYLES: how often what is done, how long keys are held, how fast it turns.
"""

import math
import random
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dataset.actions import wrap
from dataset.surroundings import LIQUID, REACH, SOLID, UNKNOWN
from geometry.camera import focal_length

MAX_TURN = 15.0  # degrees a frame: an action of 1
MAX_PITCH = 70.0  # degrees from the horizon


@dataclass(frozen=True)
class Style:
    """How one player plays."""

    name: str
    chance: float  # of being chosen for a clip
    # Shares of the frames. "turn", "look", "walk" and "strafe" are pure, to show each effect alone; the two
    # "away" kinds leave a view and come back to it, which is what a memory is measured on; the last four
    # meet the ground and what stands on it.
    shares: dict[str, float]
    hold: float = 1.0  # times the usual duration of a behaviour
    turns: tuple[float, float] = (0.7, MAX_TURN)  # degrees a frame, of the slowest and the fastest free turn
    pause: float = 0.0  # chance to stand for a moment after a behaviour


KINDS = (
    "still", "turn", "look", "walk", "strafe", "jump", "walk+turn", "look away", "walk away",
    "straight", "approach", "climb", "drop",
)  # fmt: skip
HEADINGS = tuple(15.0 * k for k in range(24))  # degrees from where it looks, in which the ground is searched


def _shares(*percent: int) -> dict[str, float]:
    return {kind: share / 100 for kind, share in zip(KINDS, percent, strict=True)}


STYLES = {
    style.name: style
    for style in (
        Style("even", 0.3, _shares(6, 12, 6, 11, 8, 6, 17, 8, 6, 5, 7, 4, 4)),
        Style("calm", 0.15, _shares(11, 14, 8, 12, 6, 3, 20, 7, 5, 6, 4, 2, 2), 1.8, (0.5, 5.0), 0.3),
        Style("brisk", 0.15, _shares(3, 13, 7, 10, 12, 9, 24, 7, 4, 2, 3, 3, 3), 0.5, (3.0, MAX_TURN)),
        Style("walker", 0.2, _shares(3, 7, 4, 10, 4, 4, 20, 3, 5, 28, 6, 3, 3), 1.3, (0.7, 8.0), 0.05),
        Style("explorer", 0.2, _shares(3, 7, 4, 6, 5, 7, 12, 3, 3, 8, 22, 10, 10), 1.0, (0.7, 12.0), 0.1),
    )
}
# Frames that a walker may stand at a wall before something else is tried: some are worth learning from.
BLOCKED_FRAMES = 10
BLOCKED_SPEED = 0.08  # metres a frame; walking freely makes 0.25
WET_FRAMES = 6
ASHORE_FRAMES = 24  # dry feet for so long: more than a swimmer's bob out of the water
TOUCHING = 0.05  # metres a frame: a walker who makes less has met something
NEAR_OBSTACLE, FAR_OBSTACLE = 2.0, 12.0  # metres to what is worth walking up to
LOOKAHEAD = 3.0  # metres in which the ground is searched for a step
SWIM_CHANCE = 0.3  # to swim on for a while before it turns to the shore
DEEP = -REACH  # the rise where no ground is seen in the box of nodes below


@dataclass(frozen=True)
class Command:
    """What the player does until the next frame: held keys, the camera's turn in degrees (+right, +down)."""

    keys: frozenset[str] = frozenset()
    yaw: float = 0.0
    pitch: float = 0.0


@dataclass(frozen=True)
class Senses:
    """What the player knows of the frame it sees: degrees, metres, whether its feet are in water, and what is
    around it, where that is known, as surroundings.py describes it."""

    yaw: float
    pitch: float
    pos: tuple[float, float, float]
    wet: bool = False
    inverse_distance: np.ndarray | None = None  # [h, w], inverse ray distances in 1/m
    vertical_fov: float = 70.0
    nodes: np.ndarray | None = None  # [7, 7, 7]
    origin: tuple[int, int, int] = (0, 0, 0)


Behaviour = Iterator[Command]
HORIZONTAL = {"forward", "back", "left", "right"}


def style_of(seed: int | str) -> Style:
    """The style of the clip with this seed."""
    styles = list(STYLES.values())
    return random.Random(f"{seed} style").choices(styles, [style.chance for style in styles])[0]


class Player:
    """Call it with the Senses of each frame; it returns the Command until the next one. Without a style it is
    the even one."""

    def __init__(self, seed: int | str, style: Style | None = None):
        self.random, self.style = random.Random(seed), style or STYLES["even"]
        self.spent = dict.fromkeys(KINDS, 0)  # frames for each kind
        self.kind = "still"
        self.behaviour: Behaviour = iter(())
        self.senses = Senses(0.0, 0.0, (0.0, 0.0, 0.0))
        self.made = 0.0  # metres along the ground since the frame before
        self.places: deque[tuple[float, float]] = deque(maxlen=BLOCKED_FRAMES + 1)  # while keys move it
        self.wet = self.dry = 0  # frames with wet feet since it was ashore; frames in a row with dry feet
        self.shore: tuple[float, float] | None = None  # x, z where it was last ashore
        self.leaving_water = False
        self.swam = False  # since it was last ashore
        self.escapes = 0  # tries in a row to get off a wall

    def __call__(self, senses: Senses) -> Command:
        self.made = math.dist(senses.pos[::2], self.senses.pos[::2])
        self.senses = senses
        self._watch_out()
        command = next(self.behaviour, None)
        while command is None:
            if self.random.random() < self.style.pause:
                self.kind, self.behaviour = "still", self._hold(set(), self.random.randint(2, 14))
            else:
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
        shares = self.style.shares
        lacking = [max(share * total - self.spent[kind], 0.0) for kind, share in shares.items()]
        return self.random.choices(list(shares), lacking)[0]

    # -------------------------------------------------------- walls and water

    def _watch_out(self) -> None:
        if self.senses.wet:
            self.wet += 1
            self.dry = 0
        else:
            self.dry += 1
        if self.dry >= ASHORE_FRAMES:
            self.wet, self.swam = 0, False
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
        """Turns to where it was last ashore, or round, and swims there, at once or after a while."""
        self.kind, self.leaving_water = "walk+turn", True
        keys = {"forward", "jump"}
        if not self.swam and self.random.random() < SWIM_CHANCE:
            yield from self._hold(keys, self.random.randint(6, 20))
        self.swam = True
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

    def _frames(self, low: int, high: int) -> int:
        """A duration in frames, longer or shorter as the style has it."""
        return max(1, round(self.random.randint(low, high) * self.style.hold))

    def _turn_speed(self, low: float, high: float) -> float:
        """Degrees a frame of a turn with a goal, no faster than the style turns."""
        return min(self._log_uniform(low, high), self.style.turns[1])

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

    def _tilt(self, goal: float, speed: float) -> float:
        """The pitch of one frame on the way to `goal`."""
        missing = goal - self.senses.pitch
        return math.copysign(min(abs(missing), speed), missing) if abs(missing) > 0.3 else 0.0

    def _yaw_rates(self, frames: int) -> list[float]:
        """Degrees a frame of one turn: held, swinging up and down like a hand, uneven, or to and fro."""
        shape = self.random.choice(("held", "swing", "uneven", "to and fro"))
        peak = self._sign() * self._log_uniform(*self.style.turns)
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
        yield from self._hold(set(), self._frames(4, 24))

    def _turn(self) -> Behaviour:
        for rate in self._yaw_rates(self._frames(6, 32)):
            yield Command(yaw=rate)

    def _look(self) -> Behaviour:
        """Up or down, and back to the horizon."""
        goal = self._sign() * self.random.triangular(5, 60, 15)
        yield from self._pitch_to(goal, self._turn_speed(0.5, 12))
        yield from self._hold(set(), self.random.randint(0, 6))
        yield from self._pitch_to(self._level(), self._turn_speed(1, 12))

    def _walk(self) -> Behaviour:
        yield from self._hold({self.random.choice(("forward",) * 3 + ("back",))}, self._frames(8, 48))

    def _strafe(self) -> Behaviour:
        keys = {self.random.choice(("left", "right"))}
        if self.random.random() < 0.35:
            keys.add(self.random.choice(("forward", "back")))
        yield from self._hold(keys, self._frames(6, 28))

    def _jump(self) -> Behaviour:
        keys = {"jump"} | self.random.choice((set(), {"forward"}, {"forward"}, self._direction()))
        frames = self._frames(4, 26)
        turning = self.random.random() < 0.3
        for rate in self._yaw_rates(frames) if turning else [0.0] * frames:
            yield Command(frozenset(keys), yaw=rate)

    def _walk_turn(self) -> Behaviour:
        keys = self._direction()
        frames = self._frames(8, 48)
        goal = self._level() if self.random.random() < 0.4 else self.senses.pitch
        speed = self._log_uniform(0.4, 4)
        hop = self.random.randrange(frames) if self.random.random() < 0.25 else -1
        for k, rate in enumerate(self._yaw_rates(frames)):
            jumping = {"jump"} if hop >= 0 and k in range(hop, hop + 4) else set()
            yield Command(frozenset(keys | jumping), yaw=rate, pitch=self._tilt(goal, speed))

    def _look_away(self) -> Behaviour:
        """Turns away, waits, and turns back to where it looked."""
        angle = self._sign() * self.random.choice((30, 60, 90, 180)) * self.random.uniform(0.85, 1.15)
        start = self.senses.yaw
        yield from self._hold(set(), self.random.randint(1, 4))
        yield from self._turn_by(angle, self._turn_speed(3, 14))
        yield from self._hold(set(), self.random.randint(0, 16))
        yield from self._turn_by(start - self.senses.yaw, self._turn_speed(3, 14))
        yield from self._hold(set(), self.random.randint(2, 6))

    def _walk_away(self) -> Behaviour:
        """Walks off and comes back, backwards or turned round, and looks where it looked."""
        frames = self._frames(12, 40)
        start = self.senses.yaw
        if self.random.random() < 0.5:
            out, back = self.random.choice(
                (("forward", "back"), ("back", "forward"), ("left", "right"), ("right", "left"))
            )
            yield from self._hold({out}, frames)
            yield from self._hold(set(), self.random.randint(0, 4))
            yield from self._hold({back}, frames)
        else:
            speed = self._turn_speed(5, 14)
            yield from self._hold({"forward"}, frames)
            yield from self._turn_by(180.0 * self._sign(), speed)
            yield from self._hold({"forward"}, frames)
            yield from self._turn_by(wrap(start - self.senses.yaw), speed)
        yield from self._hold(set(), self.random.randint(2, 6))

    def _straight(self) -> Behaviour:
        """A long way straight on, or in a wide bend, and over what is one block high."""
        bend = self._sign() * self.random.choice((0.0, 0.0, 0.3, 0.8))
        goal, speed = self._level(), self._log_uniform(0.2, 3)
        for _ in range(self._frames(48, 144)):
            yield Command(frozenset({"forward"} | self._hop()), yaw=bend, pitch=self._tilt(goal, speed))

    def _approach(self) -> Behaviour:
        """Walks up to something that stands in the way, pushes against it for a moment, then slides along it,
        steps aside, or goes back."""
        yield from self._turn_by(self._to_obstacle(), self._turn_speed(2, 12))
        touched, enough = 0, self.random.randint(2, 7)
        goal, speed = self._level(), self._log_uniform(0.2, 3)
        for k in range(56):
            touched = touched + 1 if k > 3 and self.made < TOUCHING else 0
            if touched >= enough:
                break
            yield Command(frozenset({"forward"}), pitch=self._tilt(goal, speed))
        side = self._sign()
        what = self.random.choices(("slide", "sidestep", "back"), (5, 2, 2))[0]
        if what == "slide":
            yield from self._turn_by(side * self.random.uniform(25, 85), self._turn_speed(2, 12), {"forward"})
            yield from self._hold({"forward"}, self._frames(8, 32))
        elif what == "sidestep":
            keys = {"forward", "right" if side > 0 else "left"}
            yield from self._hold(keys, self._frames(8, 24))
        else:
            yield from self._hold({"back"}, self._frames(6, 20))

    def _climb(self) -> Behaviour:
        """Onto a block that is one higher: walks to it and jumps."""
        yield from self._step((1,))

    def _drop(self) -> Behaviour:
        """Down by one or two, not into what is too deep to be seen in the box: that often is a cave."""
        yield from self._step(range(DEEP + 1, 0))

    # -------------------------------------------------------- the ground and what stands on it

    def _step(self, rises: Collection[int]) -> Behaviour:
        """Turns to where the ground rises by one of `rises`, and goes there. Where it sees none it goes on by
        some steps, to look for one from elsewhere."""
        good = [turn for turn in HEADINGS if self._rise(self.senses.yaw + turn) in rises]
        if not good:
            yield from self._turn_by(self._sign() * self.random.uniform(0, 90), self._turn_speed(3, 12))
            yield from self._hold({"forward"}, self._frames(8, 24))
            return
        turn = wrap(self.random.choice(good))
        yield from self._turn_by(turn, self._turn_speed(3, 14))
        start = self.senses.pos[1]
        goal, speed = self.random.triangular(-5, 45, 10), self._log_uniform(0.5, 6)  # an eye on the step
        for _ in range(32):
            if abs(self.senses.pos[1] - start) > 0.7 and self.random.random() < 0.2:
                break
            yield Command(frozenset({"forward"} | self._hop()), pitch=self._tilt(goal, speed))

    def _ground(self, ahead: float, yaw: float) -> int | None:
        """Metres from the feet's node up to the ground `ahead` metres along `yaw`; DEEP where it is below the
        box, None where that is unknown or water covers it."""
        column = self._column(ahead, yaw)
        for j in range(REACH + 2, -1, -1):  # from above the head down
            if column is None or column[j] in (UNKNOWN, LIQUID):
                return None
            if column[j] == SOLID:
                return j + 1 - REACH
        return DEEP

    def _column(self, ahead: float, yaw: float) -> np.ndarray | None:
        """The nodes [7] `ahead` metres along `yaw`, from below; None outside the box."""
        nodes, (x, _, z) = self.senses.nodes, self.senses.pos
        if nodes is None:
            return None
        x, z = x - ahead * math.sin(math.radians(yaw)), z + ahead * math.cos(math.radians(yaw))
        i, k = round(x) - self.senses.origin[0], round(z) - self.senses.origin[2]
        return nodes[i, :, k] if 0 <= i < len(nodes) and 0 <= k < len(nodes) else None

    def _rise(self, yaw: float) -> int:
        """How much the ground rises where it first does within LOOKAHEAD metres along `yaw`, 0 if nowhere."""
        for step in range(1, round(LOOKAHEAD / 0.5)):
            if rise := self._ground(0.5 * step, yaw):
                return rise
        return 0

    def _hop(self) -> set[str]:
        """The key to jump with, where a block that is one higher is right ahead."""
        return {"jump"} if any(self._ground(ahead, self.senses.yaw) == 1 for ahead in (0.6, 0.9)) else set()

    def _to_obstacle(self) -> float:
        """Degrees to turn by, to face something that stands at eye level some metres away; to face anywhere
        where nothing of that kind is seen."""
        seen, senses = self.senses.inverse_distance, self.senses
        if seen is not None:
            height, width = seen.shape
            focal = focal_length(height, senses.vertical_fov)
            horizon = round(height / 2 - focal * math.tan(math.radians(senses.pitch)))
            if 0 <= horizon < height:
                row = seen[horizon]
                columns = np.flatnonzero((row > 1 / FAR_OBSTACLE) & (row < 1 / NEAR_OBSTACLE))
                if len(columns):
                    chosen = self.random.choice(columns.tolist())
                    return math.degrees(math.atan((chosen + 0.5 - width / 2) / focal))
        return self._sign() * self.random.uniform(30, 150)


def _clip(turn: float) -> float:
    return max(-MAX_TURN, min(MAX_TURN, turn))
